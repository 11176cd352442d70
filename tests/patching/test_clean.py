"""Where clean values come from makes no difference: a live cache, prompts, a store on disk, on S3, or over HTTP."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import actstore
from actstore import patching
from actstore.errors import HookError, PatchError
from actstore.patching.results.result import PatchResult
from tests.query.running import running

TinyModel = Callable[..., Path]
HOOKS = ["blocks.*.hook_resid_post", "blocks.*.hook_resid_pre", "blocks.*.attn.hook_z"]


def difference(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 6]


@pytest.mark.s3
def test_stores_give_the_grid_of_a_live_cache(tiny_model: TinyModel, s3_url: str, tmp_path: Path) -> None:
    """Bit for bit, since the stores hold the values as the same model has computed them."""
    folder = tiny_model("llama")
    ids = torch.randint(2, 300, (3, 8), generator=torch.Generator().manual_seed(3))
    pq.write_table(pa.table({"input_ids": ids.tolist()}), tmp_path / "tokens.parquet")
    for out in (str(tmp_path / "stores" / "run"), s3_url):
        actstore.extract(
            actstore.plan(
                model=str(folder),
                tokens=str(tmp_path / "tokens.parquet"),
                hooks=HOOKS,
                context_length=8,
                batch_size=3,
                dtype="float32",
                out=out,
            )
        )
    model = actstore.HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    _, live = model.run_with_cache(ids)
    corrupted = ids.clone()
    corrupted[:, 3] = 17
    with torch.no_grad():
        clean_metric = difference(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)
    grids = (("resid_pre", ("layer", "pos")), ("z", ("layer", "pos", "head")))
    expected = {
        (hook, positions): patching.grid(
            model, corrupted, live, difference, hook, axes, positions=positions
        ).values
        for hook, axes in grids
        for positions in (None, -1)
    }
    with running(tmp_path, "--root", str(tmp_path / "stores")) as server:
        for url in (str(tmp_path / "stores" / "run"), s3_url, f"{server.url}/v1/stores/run"):
            store = actstore.open(url)
            assert store.tokens[:].tolist() == ids.tolist()
            for (hook, axes), positions in itertools.product(grids, (None, -1)):
                cache = store.cache([0, 1, 2])
                result = patching.grid(model, corrupted, cache, difference, hook, axes, positions=positions)
                assert torch.equal(result.values, expected[hook, positions]), (url, hook, positions)
                # The stores have the stream out of the last layer, from which the logits follow.
                assert result.clean is not None
                torch.testing.assert_close(result.clean, clean_metric, atol=1e-5, rtol=1e-5)
            without = patching.grid(
                model, corrupted, store.cache([0, 1, 2], names_filter="blocks.*.attn.hook_z"), difference, "z"
            )
            assert without.clean is None
            with pytest.raises(HookError, match="the clean cache lacks 3 of 3 values"):
                patching.grid(model, corrupted, store.cache([0, 1, 2]), difference, "mlp_out")
            with pytest.raises(
                PatchError,
                match=r"have shape \[2, 8, 64\], and those of the corrupted prompts, 3 of 8 tokens",
            ):
                patching.grid(model, corrupted, store.cache([0, 1]), difference)
            with pytest.raises(
                PatchError, match=r"the clean side is a whole store; .* store\.cache\(\[7\]\)"
            ):
                patching.grid(model, corrupted, store, difference)


def test_prompts_and_caches_without_an_axis_of_prompts(tiny_model: TinyModel) -> None:
    model = actstore.HookedModel.from_pretrained(tiny_model("gpt2"), dtype="float32", device="cpu")
    clean, corrupted = "zq zx zk", "zq zj zk"
    assert model.to_tokens(clean).shape == model.to_tokens(corrupted).shape
    _, cache = model.run_with_cache(clean, remove_batch_dim=True)
    expected = patching.grid(model, corrupted, clean, difference)
    for other in (cache, [clean], model.to_tokens(clean), model.to_tokens(clean)[0], dict(cache)):
        result = patching.grid(model, corrupted, other, difference)
        torch.testing.assert_close(result.values, expected.values, atol=1e-6, rtol=0)
    assert expected.clean is not None
    assert float(expected.clean) == pytest.approx(float(difference(model(clean))))


@pytest.mark.parametrize("hook", ["resid_pre", "pattern", "result", "paths"])
def test_clean_prompts_run_once(tiny_model: TinyModel, hook: str) -> None:
    """For the values and the metric, with the bits of a cache and of a forward that does nothing else."""
    model = actstore.HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    clean, corrupted = (
        torch.randint(2, 300, (2, 7), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)
    )

    def patched(side: Any) -> PatchResult:
        if hook == "paths":
            senders = [(0, 1), (1, "mlp")]
            return patching.path_patch(model, corrupted, side, difference, senders, "q", positions=[1, 4])
        return patching.grid(model, corrupted, side, difference, hook, ("layer",), positions=[1, 4])

    _, cache = model.run_with_cache(clean, names_filter=[*model.names])
    number = difference(model(clean)[:, :5])
    runs: list[bool] = []
    # A hook on the model has whole rows computed, of both sides.
    handle = model.base.register_forward_pre_hook(
        lambda _module, args, kwargs: runs.append(bool(torch.equal((*args, *kwargs.values())[0], clean))),
        with_kwargs=True,
    )
    expected = patched(cache).values
    runs.clear()
    result = patched(clean)
    handle.remove()
    assert runs.count(True) == 1
    assert torch.equal(result.values, expected)
    assert result.clean is not None
    assert torch.equal(result.clean, number)


def test_values_of_another_shape_are_an_error(tiny_model: TinyModel) -> None:
    """They would be stretched over what they replace without a word."""
    model = actstore.HookedModel.from_pretrained(tiny_model("gpt2"), dtype="float32", device="cpu")
    clean, corrupted = torch.arange(2, 14).view(2, 6), torch.arange(12, 24).view(2, 6)
    _, cache = model.run_with_cache(clean)
    for hook, axes in (("resid_pre", ("layer",)), ("z", ("layer", "pos")), ("pattern", ("layer", "head"))):
        narrow = {name: value[..., :1] for name, value in cache.items()}
        with pytest.raises(PatchError, match=r"have shape .*, 1\], .* the clean run needs this model"):
            patching.grid(model, corrupted, narrow, difference, hook, axes)


def test_values_without_an_axis_of_prompts_where_sizes_are_one(tiny_model: TinyModel) -> None:
    """One head, and one token: the number of axes tells what is missing, since sizes cannot."""
    model = actstore.HookedModel.from_pretrained(tiny_model("gpt2", n_head=1), dtype="float32", device="cpu")
    for length in (1, 4):
        clean, corrupted = torch.arange(2, 2 + length)[None], torch.arange(9, 9 + length)[None]
        _, cache = model.run_with_cache(clean)
        _, bare = model.run_with_cache(clean, remove_batch_dim=True)
        for hook in ("z", "pattern"):
            expected = patching.grid(model, corrupted, cache, difference, hook, ("layer", "head"))
            result = patching.grid(model, corrupted, bare, difference, hook, ("layer", "head"))
            torch.testing.assert_close(result.values, expected.values, atol=1e-6, rtol=0, msg=hook)


def test_tokens_of_a_store_are_prompts_everywhere(tiny_model: TinyModel) -> None:
    """They are arrays of NumPy, with ids of 32 bits."""
    model = actstore.HookedModel.from_pretrained(tiny_model("llama"), dtype="float32", device="cpu")
    ids = torch.randint(2, 300, (2, 6), generator=torch.Generator().manual_seed(5))
    as_stored: Any = ids.numpy().astype("int32")
    others = ids.flip(1)
    assert torch.equal(model(as_stored), model(ids))
    experiments: list[Callable[[Any], Tensor]] = [
        lambda tokens: model.run_with_cache(tokens)[1]["resid_post", 1],
        lambda tokens: patching.grid(model, others, tokens, difference).values,
        lambda tokens: patching.grid(model, tokens, others, difference).values,
        lambda tokens: patching.ablate(model, others, difference, value="mean", source=tokens).values,
        lambda tokens: patching.ablate(model, others, difference, value="resample", source=tokens).values,
        lambda tokens: patching.steering_vector(model, tokens, others, 1),
    ]
    for experiment in experiments:
        assert torch.equal(experiment(as_stored), experiment(ids))
