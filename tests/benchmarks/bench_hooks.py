"""Live capture compared with the bare forward, TransformerLens' Bridge and SAELens' wrapper of Hugging Face models."""

import logging
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actstore.hooks.model import HookedModel
from tests.benchmarks.measure import Against, Result, Side, Speed, interleaved, timed


@dataclass(frozen=True)
class Setting:
    """The model, the batch, and the number of forwards."""

    model: Path
    title: str
    dtype: str
    device: str
    n_layers: int
    """Number of layers after which every forward of every side ends."""
    batch: int
    context: int
    n_forwards: int = 1
    """Forwards in one unit of work; a GPU gets several before it is waited for."""

    def tokens(self) -> Tensor:
        """Random ids of the model's vocabulary, [batch, context]."""
        from transformers import AutoConfig

        n_ids = AutoConfig.from_pretrained(self.model).vocab_size
        ids = torch.randint(0, n_ids, (self.batch, self.context), generator=torch.Generator().manual_seed(0))
        return ids.to(self.device)


def on_cpu(model: Path) -> Setting:
    """SmolLM2-135M up to its layer 3: CPUs without bfloat16 arithmetic are slow."""
    return Setting(model, "SmolLM2-135M bf16", "bfloat16", "cpu", 4, 8, 128)


def run(setting: Setting) -> list[Result]:
    """Measure in a separate process: a worker may have changed the heap of this one."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure, setting).result()


def measure(setting: Setting) -> list[Result]:
    """Measure all speeds for which the packages are installed."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    results = _few_hooks(setting)
    if find_spec("transformer_lens"):
        results += _everything(setting)
        if setting.device == "cpu":
            # Where bfloat16 is emulated, matrix products take nearly all of the time of both.
            results += _everything(
                replace(setting, dtype="float32", title=setting.title.replace("bf16", "float32"))
            )
    return results


def bare(setting: Setting) -> Callable[[], object]:
    """The forward of the plain Hugging Face base model, cut after the last hooked layer."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(setting.model)
    config.num_hidden_layers = setting.n_layers
    model = AutoModel.from_pretrained(setting.model, config=config, dtype=getattr(torch, setting.dtype))
    model.to(setting.device).eval()
    tokens = setting.tokens()
    return lambda: model(input_ids=tokens, use_cache=False)


def actstore_model(setting: Setting) -> HookedModel:
    return HookedModel.from_pretrained(str(setting.model), dtype=setting.dtype, device=setting.device)


def _few_hooks(setting: Setting) -> list[Result]:
    model = actstore_model(setting)
    tokens = setting.tokens()
    stop = setting.n_layers
    last = f"blocks.{stop - 1}.hook_resid_post"

    def capture(names: str) -> Callable[[], object]:
        return lambda: model.run_with_cache(tokens, names_filter=names, stop_at_layer=stop, return_type=None)

    runs = {
        "bare": bare(setting),
        "one": capture(last),
        "all": capture("blocks.*.hook_resid_post"),
        "pattern": capture(f"blocks.{stop - 1}.attn.hook_pattern"),
    }
    if find_spec("transformer_lens"):
        runs["bridge"] = _bridge_run(setting, names_filter=last)
    if find_spec("sae_lens"):
        runs["saelens"] = _saelens_run(setting)
    rates = interleaved(_sides(setting, runs))

    def speed(what: str, ours: str, target: float, peers: dict[str, str]) -> Speed:
        limit = Against("bare forward of the same layers", rates["bare"], target, is_limit=True)
        against = [Against(peer, rates[run], 1) for run, peer in peers.items() if run in rates]
        return Speed(_name(setting, what), "tokens/s", rates[ours], (limit, *against))

    peers = {"bridge": "TransformerLens run_with_cache", "saelens": "SAELens HookedProxyLM"}
    return [
        speed("resid_post of the last layer", "one", 0.97, peers),
        speed("resid_post of all layers", "all", 0.93, {}),
        speed("pattern of the last layer", "pattern", 0.9, {}),
    ]


def _everything(setting: Setting) -> list[Result]:
    model = actstore_model(setting)
    tokens = setting.tokens()
    theirs = _bridge_run(setting)
    with torch.inference_mode():
        cached = frozenset(theirs()[1].keys())
    names = [name for name in model.names.all if name in cached]

    def ours() -> object:
        return model.run_with_cache(
            tokens, names_filter=names, stop_at_layer=setting.n_layers, return_type=None
        )

    runs = {"ours": ours, "theirs": theirs, "bare": bare(setting)}
    rates = interleaved(_sides(setting, runs))
    name = _name(setting, f"all {len(names)} hooks that both have")
    # No capture is faster than a forward that captures nothing, so the peer's factor has a bound, too.
    bound = rates["bare"].median / rates["theirs"].median
    limit = Against("bare forward of the same layers", rates["bare"], 0.6, is_limit=True)
    peer = Against(f"TransformerLens caching everything ({bound:.3g} at most)", rates["theirs"], 1)
    return [Speed(name, "tokens/s", rates["ours"], (limit, peer))]


def _name(setting: Setting, what: str) -> str:
    return f"{setting.title}, {setting.n_layers} layers, {setting.batch}x{setting.context}: {what}"


def _bridge_run(setting: Setting, **options: Any) -> Callable[[], Any]:
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(
        str(setting.model), dtype=getattr(torch, setting.dtype), device=setting.device
    )
    tokens = setting.tokens()
    return lambda: bridge.run_with_cache(tokens, stop_at_layer=setting.n_layers, **options)


def _saelens_run(setting: Setting) -> Callable[[], object]:
    """As in `ActivationsStore`: only the module of the hook is instrumented, and the forward ends after it."""
    from sae_lens.load_model import load_model

    module = f"model.layers.{setting.n_layers - 1}"
    model = load_model(
        "AutoModelForCausalLM",
        str(setting.model),
        device=setting.device,
        model_from_pretrained_kwargs={"dtype": getattr(torch, setting.dtype)},
        hook_names=[module],
    )
    tokens = setting.tokens()
    return lambda: model.run_with_cache(
        tokens, names_filter=[module], stop_at_layer=setting.n_layers, prepend_bos=False
    )


def _sides(setting: Setting, runs: dict[str, Callable[[], object]]) -> dict[str, Side]:
    """Forwards, including everything that they start on a device."""

    def side(run: Callable[[], object]) -> Side:
        def forward() -> float:
            with torch.inference_mode():
                for _ in range(setting.n_forwards):
                    run()
                synchronize(setting.device)
            return setting.n_forwards * setting.batch * setting.context

        return timed(forward)

    return {name: side(run) for name, run in runs.items()}


def synchronize(device: str) -> None:
    """Wait for everything that runs on a GPU."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
