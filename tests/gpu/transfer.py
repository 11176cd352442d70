"""Hook values on their way to host memory while the forward goes on, as in a worker."""

from collections.abc import Sequence

import torch
from torch import Tensor

from actstore.extraction.computing.buffers import SegmentBuffers
from actstore.hooks.model import HookedModel
from actstore.store.format.plan import HookArray, ModelIdentity, Plan, Request, TokensIdentity
from tests.benchmarks.measure import Side, timed


def residual_hooks(model: HookedModel) -> list[str]:
    """Three streams; the last one keeps the forward from ending early."""
    n_layers = model.cfg.n_layers
    return [f"blocks.{layer}.hook_resid_post" for layer in (n_layers // 4, n_layers // 2, n_layers - 1)]


def buffers(model: HookedModel, hooks: Sequence[str], tokens: Tensor, n_batches: int) -> SegmentBuffers:
    """Host memory for some batches of residual streams."""
    batch, context = tokens.shape
    planned = Plan(
        run="0000",
        tokens_of="0000",
        request=Request(
            model=ModelIdentity(
                name="model",
                revision=None,
                fingerprint="none",
                model_type=model.cfg.model_type,
                n_layers=model.cfg.n_layers,
                config={},
            ),
            tokens=TokensIdentity(
                source="random",
                files=(),
                column=None,
                documents="file",
                tokenizer=None,
                tokenizer_sha256=None,
                packing="concat",
                context_length=context,
                begin_batch_token=None,
                begin_sequence_token=None,
                separator_token=None,
                pad_token=None,
                max_tokens=None,
                skip_sequences=0,
                seed=None,
            ),
            hooks=tuple(
                HookArray(name=hook, shape=(model.cfg.d_model,), axes=("d_model",)) for hook in hooks
            ),
            dtype=str(model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
            batch_size=batch,
            compression=None,
            covariance=False,
        ),
        n_sequences=n_batches * batch,
        n_tokens=n_batches * tokens.numel(),
        n_documents=1,
        tokens_sha256="",
        segment_size=n_batches * batch,
    )
    return SegmentBuffers(planned, model.device)


def fill(
    model: HookedModel, hooks: Sequence[str], tokens: Tensor, to: SegmentBuffers, n_batches: int
) -> None:
    """Forward the batches of one segment, and wait until all values have arrived."""
    size = len(tokens)
    for start in range(0, n_batches * size, size):

        def take(hook: str, value: Tensor, start: int = start) -> None:
            to.put(hook, start, size, value)

        model.run(tokens, hooks, take)
    to.finish()


def sides(model: HookedModel, tokens: Tensor, *, n_batches: int) -> dict[str, Side]:
    """Tokens of "copies", with three residual streams going to host memory, and of the "bare" forward."""
    hooks = residual_hooks(model)
    to = buffers(model, hooks, tokens, n_batches)

    def copies() -> float:
        fill(model, hooks, tokens, to, n_batches)
        return n_batches * tokens.numel()

    def bare() -> float:
        with torch.inference_mode():
            for _ in range(n_batches):
                model.base(input_ids=tokens, use_cache=False)
        if tokens.is_cuda:
            torch.cuda.synchronize()
        return n_batches * tokens.numel()

    return {"copies": timed(copies), "bare": timed(bare)}
