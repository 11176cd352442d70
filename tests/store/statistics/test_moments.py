"""Statistics of tensors and of stored bytes, compared with NumPy in float64."""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from actstore.store.format.batches import Batch
from actstore.store.format.plan import HookArray
from actstore.store.statistics import moments
from actstore.store.statistics.array_text import encoded
from actstore.store.statistics.hook_statistics import HookStatistics
from actstore.store.statistics.merging import merge
from actstore.store.statistics.moments import Moments, agree, has_statistics, of_rows

RESID = HookArray(name="resid", shape=(24,), axes=("d_model",))
HEADS = HookArray(name="z", shape=(3, 8), axes=("head", "d_head"))
SCALAR = HookArray(name="scale", shape=(), axes=())
PATTERN = HookArray(name="pattern", shape=(3, 5), axes=("head", "source_position"))

DTYPES = ["bfloat16", "float16", "float32"]
LARGEST = {"bfloat16": 3.3895e38, "float16": 65504.0, "float32": 3.4028e38}
N, LENGTH, BATCH = 10, 7, 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that a batch has several, the last one short."""
    monkeypatch.setattr(moments, "_CPU_CHUNK", 24 * 5)
    monkeypatch.setattr(moments, "_GPU_CHUNK", 24 * 5)


@dataclass
class Example:
    """Values [N, LENGTH, *shape] in rows of several lengths."""

    hook: HookArray
    dtype: str
    values: torch.Tensor
    lengths: NDArray[np.int32]

    @property
    def is_real(self) -> torch.Tensor:
        return torch.from_numpy(np.arange(LENGTH) < self.lengths[:, None])

    @property
    def tokens(self) -> NDArray[np.float64]:
        """The real tokens, [n, D]."""
        return self.values.double()[self.is_real].reshape(int(self.lengths.sum()), -1).numpy()

    def computed(self, device: str = "cpu", *, covariance: bool = True) -> HookStatistics:
        sums = Moments([self.hook], device, covariance=covariance)
        for start in range(0, N, BATCH):
            batch = slice(start, start + BATCH)
            sums.add(self.hook.name, self.values[batch].to(device), self.is_real[batch].to(device))
        return sums.records()[self.hook.name]

    def recomputed(self) -> HookStatistics:
        carrier = torch.float32 if self.dtype == "float32" else torch.int16
        rows = self.values.view(carrier).numpy()
        rows = rows.view({"bfloat16": "<u2", "float16": "<f2", "float32": "<f4"}[self.dtype])
        rows.flags.writeable = False  # as a mapped file is
        return of_rows(self.hook, rows, self.dtype, self.lengths, batches(N, BATCH), covariance=True)


def batches(n_rows: int, size: int) -> list[Batch]:
    """Batches in stored order."""
    return [Batch(np.arange(n_rows)[start : start + size], LENGTH) for start in range(0, n_rows, size)]


def example(hook: HookArray = RESID, dtype: str = "float32", seed: int = 0) -> Example:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(N, LENGTH, *hook.shape, generator=generator) * 5 + 1
    lengths = np.array([7, 7, 7, 7, 7, 3, 1, 0, 6, 7], dtype=np.int32)
    padded = Example(hook, dtype, values.to(getattr(torch, dtype)), lengths)
    # Padding must not matter, whether it is finite or not.
    padded.values[~padded.is_real] = 1e4
    padded.values[5, -1] = float("nan")
    return padded


def assert_true(record: HookStatistics, hook: HookArray, tokens: NDArray[np.float64]) -> None:
    """Compare a record with NumPy on tokens [n, D]."""
    finite = tokens[np.isfinite(tokens).all(axis=1)]
    norms = np.sqrt(np.square(finite).sum(axis=1))
    record.check(hook.shape)
    result = merge([record], hook.shape)
    assert (result.count, result.n_not_finite) == (len(finite), len(tokens) - len(finite))
    scale = np.abs(finite).mean(axis=0).reshape(hook.shape)
    assert np.all(np.abs(result.mean - finite.mean(axis=0).reshape(hook.shape)) <= 1e-14 * scale)
    assert result.mean_norm == pytest.approx(norms.mean(), rel=1e-13)
    assert result.mean_squared_norm == pytest.approx(np.square(norms).mean(), rel=1e-13)
    assert result.max_abs == np.abs(finite).max()
    assert (result.min_norm, result.max_norm) == pytest.approx((norms.min(), norms.max()), rel=1e-14)
    for q in (0.0, 0.3, 0.5, 0.9, 1.0):
        assert result.norm_quantile(q) == pytest.approx(np.quantile(norms, q, method="lower"), rel=0.0101)
    if result.covariance is not None:
        moment = np.square(finite).mean()
        truth = np.atleast_2d(np.cov(finite.T, bias=True))
        np.testing.assert_allclose(result.covariance, truth, rtol=1e-11, atol=1e-13 * moment)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", [RESID, HEADS, SCALAR], ids=lambda hook: hook.name)
def test_real_tokens_against_numpy(hook: HookArray, dtype: str) -> None:
    one = example(hook, dtype)
    assert_true(one.computed(), hook, one.tokens)
    assert one.computed(covariance=False).second_moment is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_with_nan_or_infinity_are_only_counted(dtype: str) -> None:
    one = example(HEADS, dtype)
    for place, bad in (((0, 0, 0, 0), "nan"), ((0, 3, 2, 7), "inf"), ((4, 6, 1, 1), "-inf")):
        one.values[place] = float(bad)
    one.values[1] = float("nan")
    record = one.computed()
    assert record.n_not_finite == 3 + LENGTH
    assert_true(record, HEADS, one.tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_values_do_not_overflow(dtype: str) -> None:
    one = example(RESID, dtype)
    one.values[one.is_real] = torch.tensor(-LARGEST[dtype]).to(one.values.dtype)
    assert one.values[one.is_real].isfinite().all()
    record = one.computed()
    assert record.count == one.lengths.sum()
    assert_true(record, RESID, one.tokens)


@pytest.mark.parametrize("dtype", DTYPES)
def test_smallest_values_and_zeros(dtype: str) -> None:
    one = example(RESID, dtype)
    one.values[one.is_real] = -0.0
    smallest = np.frombuffer(b"\1\0\0\0", {"bfloat16": "<u2", "float16": "<u2"}.get(dtype, "<u4"))[0]
    carrier = torch.int32 if dtype == "float32" else torch.int16
    one.values.view(carrier)[0, 0, 0] = int(smallest)
    record = one.computed()
    assert record.norms.n_zero == one.lengths.sum() - 1
    assert record.max_abs == record.max_norm == float(one.values[0, 0, 0]) > 0
    assert record.min_norm == 0
    assert merge([record], (24,)).mean[0] == record.max_norm / record.count


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("n_batches", [0, 2])
def test_segments_without_real_tokens(n_batches: int, covariance: bool) -> None:
    sums = Moments([HEADS], "cpu", covariance=covariance)
    for _ in range(n_batches):
        sums.add("z", torch.full((2, 5, 3, 8), torch.nan), torch.zeros(2, 5, dtype=torch.bool))
    record = sums.records()["z"]
    record.check(HEADS.shape)
    assert (record.count, record.n_not_finite, record.max_abs) == (0, 0, None)


def test_hooks_are_kept_apart_and_forgotten_on_reset() -> None:
    resid, heads = example(RESID), example(HEADS, seed=1)
    sums = Moments([RESID, PATTERN, HEADS], "cpu", covariance=False)
    first = None
    for _ in range(2):
        sums.add("resid", resid.values, resid.is_real)
        sums.add("z", heads.values, heads.is_real)
        sums.add("pattern", torch.zeros(N, LENGTH, 3, LENGTH), resid.is_real)
        records = sums.records()
        assert list(records) == ["resid", "z"]
        assert_true(records["resid"], RESID, resid.tokens)
        assert_true(records["z"], HEADS, heads.tokens)
        assert first in (None, records)
        first = records
        sums.reset()
    with pytest.raises(KeyError):
        sums.add("mlp", resid.values, resid.is_real)


def test_positions_are_no_axis_of_a_mean() -> None:
    assert [has_statistics(hook) for hook in (RESID, HEADS, SCALAR, PATTERN)] == [True, True, True, False]


def test_inference_mode_comes_and_goes() -> None:
    one = example()
    with torch.inference_mode():
        sums = Moments([RESID], "cpu", covariance=True)
        sums.add("resid", one.values[:4].clone(), one.is_real[:4])
    sums.add("resid", one.values[4:].requires_grad_(), one.is_real[4:])
    one.values = one.values.detach()
    assert_true(sums.records()["resid"], RESID, one.tokens)


def test_values_need_not_be_contiguous() -> None:
    one = example(HEADS)
    strided = one.values.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert not strided.is_contiguous()
    one_record = one.computed()
    one.values = strided
    assert one.computed() == one_record


@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_equal_batches_give_equal_bytes_on_any_number_of_threads(
    n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moments, "_CPU_CHUNK", 1 << 16)
    wide = HookArray(name="wide", shape=(513,), axes=("d_model",))
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(8, 100, 513, generator=generator) * torch.randn(8, 100, 1, generator=generator).exp()
    before = torch.get_num_threads()
    records = []
    try:
        for n in (1, n_threads):
            torch.set_num_threads(n)
            sums = Moments([wide], "cpu", covariance=False)
            sums.add("wide", values, torch.ones(8, 100, dtype=torch.bool))
            records.append(sums.records()["wide"].model_dump_json())
    finally:
        torch.set_num_threads(before)
    assert records[0] == records[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", [RESID, HEADS, SCALAR], ids=lambda hook: hook.name)
def test_stored_bytes_give_the_same_record(hook: HookArray, dtype: str) -> None:
    one = example(hook, dtype)
    assert one.recomputed().model_dump_json() == one.computed().model_dump_json()


def test_bfloat16_bytes_are_read_as_bfloat16() -> None:
    rows = np.array([[[1.5, -2.0]]], dtype=ml_dtypes.bfloat16).view("<u2")
    hook = HookArray(name="two", shape=(2,), axes=("d_model",))
    record = of_rows(hook, rows, "bfloat16", np.array([1]), batches(1, 1))
    assert (record.sum, record.max_abs, record.max_norm) == (encoded(np.array([1.5, -2.0])), 2.0, 2.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hook", [RESID, SCALAR], ids=lambda hook: hook.name)
def test_arithmetic_of_the_gpu_agrees(hook: HookArray, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one = example(hook, dtype)
    one.values.reshape(N, LENGTH, -1)[2, 3, 0] = float("inf")
    on_cpu = one.computed()
    monkeypatch.setattr(moments._Sums, "_add_on_cpu", moments._Sums._add_on_gpu)
    on_gpu = one.computed()
    assert_true(on_gpu, hook, one.tokens)
    assert agree(on_gpu, on_cpu) is None


def test_adding_never_waits_for_the_device() -> None:
    """A meta tensor has no values, so looking at one would raise an error."""
    sums = Moments([RESID], "meta", covariance=True)
    is_real = torch.ones(4, 7, dtype=torch.bool, device="meta")
    sums.add("resid", torch.empty(4, 7, 24, dtype=torch.bfloat16, device="meta"), is_real)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_agrees_with_stored_bytes(dtype: str) -> None:
    one = example(HEADS, dtype)
    on_gpu = one.computed("cuda")
    assert_true(on_gpu, HEADS, one.tokens)
    assert agree(on_gpu, one.recomputed()) is None
    assert one.computed("cuda") == on_gpu
    values, is_real = one.values.cuda(), one.is_real.cuda()
    sums = Moments([HEADS], "cuda", covariance=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add("z", values, is_real)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"count": 3}, "count is 3, and the stored values give 52"),
        ({"n_not_finite": 1}, "n_not_finite is 1, and the stored values give 0"),
        ({"max_abs": 1.0}, "max_abs is 1.0, and the stored values give"),
        ({"max_abs": None}, "max_abs is None"),
        ({"sum_of_norms": 1 + 1e-12}, None),
        ({"sum_of_norms": 1 + 1e-6}, "sum_of_norms is"),
        ({"sum_of_squared_norms": 1 - 1e-6}, "sum_of_squared_norms is"),
        ({"min_norm": 1 + 1e-6}, "min_norm is"),
        ({"max_norm": 1 - 1e-6}, "max_norm is"),
        ({"sum": 1e-12}, None),
        ({"sum": 1e-6}, "sum is not that of the stored values"),
        ({"second_moment": 1e-12}, None),
        ({"second_moment": 1e-6}, "second_moment is not that of the stored values"),
        ({"second_moment": None}, "second_moment is in only one"),
    ],
    ids=str,
)
def test_records_that_disagree(change: dict[str, Any], words: str | None) -> None:
    """Numbers are multiplied by the change; in arrays, one element is shifted by that part of the scale."""
    one = example(dtype="bfloat16")
    there = one.recomputed()
    total, moment = there.arrays(RESID.shape)
    assert moment is not None
    arrays = {"sum": (total, there.sum_of_norms), "second_moment": (moment, there.sum_of_squared_norms)}
    for name, by in change.items():
        new = by
        if isinstance(by, float) and name in arrays:
            array, scale = arrays[name]
            new = encoded(array + by * scale * (np.arange(array.size) == 5))
        elif isinstance(by, float) and name != "max_abs":
            new = getattr(there, name) * by
        there = there.model_copy(update={name: new})
    problem = agree(there, one.recomputed())
    assert problem is None if words is None else problem is not None and words in problem


@pytest.mark.parametrize(
    ("buckets", "fits"),
    [
        ([(1, 5), (2, 5), (4, 1)], True),
        ([(1, 5), (2, 4), (4, 2)], False),
        ([(2, 6), (3, 4), (4, 1)], True),
        ([(1, 5), (2, 5), (5, 1)], False),
        ([(1, 7), (2, 3), (4, 1)], True),
        ([(0, 1), (1, 4), (2, 5), (4, 1)], True),
        ([(-1, 1), (1, 4), (2, 5), (4, 1)], False),
        ([(1, 11)], False),
        ([(1, 5), (2, 5), (4, 2)], False),
    ],
)
def test_norms_may_be_in_neighbouring_buckets(buckets: list[tuple[int, int]], fits: bool) -> None:
    here = HookStatistics.of_tokens(np.ones(11), np.ones(24), 1.0)
    stored, recomputed = (
        here.model_copy(update={"norms": here.norms.model_copy(update={"buckets": tuple(pairs)})})
        for pairs in (buckets, [(1, 5), (2, 5), (3, 1)])
    )
    assert (agree(stored, recomputed) is None) == fits
