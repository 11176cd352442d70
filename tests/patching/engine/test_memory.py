"""Memory of a grid above one forward: that of the logits of one cell, however many cells and sets there are."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import Tensor

from actstore import patching
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
N_VOCAB: Final = 400_000
LENGTH: Final = 32
CELL_NBYTES: Final = LENGTH * N_VOCAB * 4
"""Logits of one cell at all positions, 51 MB: more than malloc keeps when they are freed."""
BUDGET: Final = 256


def peak(folder: Path, engine: str, is_of_sets: bool) -> float:
    """Memory at the peak of a run of four cells above that of a forward, in logits of a cell."""
    torch.set_num_threads(1)
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    corrupted = torch.randint(2, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))

    def metric(logits: Tensor) -> Tensor:
        assert logits.shape[1] == LENGTH
        return logits[:, :, 5].sum(1)

    model(corrupted)
    model.run_with_cache(corrupted, names_filter="blocks.*.attn.hook_z", return_type=None)
    _peak_nbytes()
    model(corrupted)
    before = _peak_nbytes()
    together = [[(0, head)] for head in range(4)] if is_of_sets else None
    patching.ablate(model, corrupted, metric, together=together, max_tokens=BUDGET, engine=engine)
    return (_peak_nbytes() - before) / CELL_NBYTES


def _peak_nbytes() -> int:
    """Bytes at the peak since the last call."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (line,) = (line for line in status if line.startswith("VmHWM:"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize(
    ("engine", "most"),
    [("packed rows", 1.5), ("whole rows", 2.5)],  # a forward makes its logits beside those that are compared
)
def test_logits_of_one_cell_are_in_memory(tiny_model: TinyModel, engine: str, most: float) -> None:
    folder = tiny_model("llama", vocab_size=N_VOCAB, hidden_size=16, head_dim=4, num_hidden_layers=1)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        for is_of_sets in (False, True):
            above = process.submit(peak, folder, engine, is_of_sets).result()
            assert above < most, is_of_sets
