"""The memory cost of capture: its peak above the bare forward's, compared with the size of the captured values."""

import logging
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from actstore.hooks.model import HookedModel
from tests.benchmarks import bench_hooks
from tests.benchmarks.bench_hooks import Setting
from tests.benchmarks.measure import Figure, Result

_ALLOWED_MB = 50


def on_cpu(model: Path) -> Setting:
    """Longer rows, so that values are larger than the noise of an allocator."""
    return replace(bench_hooks.on_cpu(model), context=512)


def run(setting: Setting) -> list[Result]:
    """Measure the peaks of processes that do nothing else."""
    wanted = {
        "resid_post of all layers": "blocks.*.hook_resid_post",
        "pattern of one layer": f"blocks.{setting.n_layers - 1}.attn.hook_pattern",
        "all hooks": "*",
    }
    bare, _ = _in_a_process_of_its_own(setting, None)
    results: list[Result] = []
    for what, names in wanted.items():
        peak, captured = _in_a_process_of_its_own(setting, names)
        where = f"{setting.title}, {setting.n_layers} layers, {setting.batch}x{setting.context}"
        name = f"{where}: memory above the bare forward for {what}, {captured:,.0f} MB"
        target = round(captured * 1.2 + _ALLOWED_MB)
        results.append(Figure(name, peak - bare, "MB", target))
    return results


def _in_a_process_of_its_own(setting: Setting, names: str | None) -> tuple[float, float]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(peak, setting, names).result()


def peak(setting: Setting, names: str | None) -> tuple[float, float]:
    """(MB at the peak of one forward, MB of the values that it kept); without names, of the bare forward."""
    logging.disable(logging.WARNING)
    model = HookedModel.from_pretrained(
        str(setting.model),
        dtype=setting.dtype,
        device=setting.device,
        n_layers=setting.n_layers,
        has_head=False,
    )
    tokens = setting.tokens()
    _forget_peak(setting.device)
    if names is None:
        with torch.inference_mode():
            model.hf(input_ids=tokens, use_cache=False)
        return _peak(setting.device), 0
    _, cache = model.run_with_cache(
        tokens, names_filter=names, stop_at_layer=setting.n_layers, return_type=None
    )
    return _peak(setting.device), sum(value.nbytes for value in cache.values()) / 1e6


def _forget_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak(device: str) -> float:
    """MB at the peak since the last `_forget_peak`."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e6
    # Not ru_maxrss: that of a new process begins with the peak of its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e6
