"""Rows are converted to the same values, however many there are and by however many threads."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from actstore.loader.rows import own_threads
from actstore.loader.rows.row_source import CONVERTED_NBYTES, select_converted

WIDTH = 1024
OF_A_BLOCK = CONVERTED_NBYTES // (2 * WIDTH)


@pytest.fixture(params=[1, 3, "torch's"])
def _threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    if request.param == "torch's":
        monkeypatch.setattr(own_threads, "_limit", lambda: None)
        torch.set_num_threads(2)
    else:
        torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(
    "n_rows", [0, 1, OF_A_BLOCK - 1, OF_A_BLOCK, OF_A_BLOCK + 1, 5 * OF_A_BLOCK, 9 * OF_A_BLOCK]
)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16])
def test_rows_in_blocks(n_rows: int, wanted: torch.dtype) -> None:
    values = torch.randn(700, WIDTH).bfloat16()
    rows = np.random.default_rng(n_rows).integers(700, size=n_rows)
    out = torch.full((n_rows, WIDTH), torch.nan, dtype=wanted)
    select_converted(values.view(torch.uint8), rows, torch.bfloat16, out)
    assert torch.equal(out, values[torch.from_numpy(rows)].to(wanted))


@pytest.mark.usefixtures("_threads")
def test_rows_that_are_larger_than_a_block() -> None:
    values = torch.randn(4, CONVERTED_NBYTES).bfloat16()
    rows = np.array([3, 0, 0, 2, 1])
    out = torch.empty(len(rows), CONVERTED_NBYTES)
    select_converted(values.view(torch.uint8), rows, torch.bfloat16, out)
    assert torch.equal(out, values[torch.from_numpy(rows)].float())
