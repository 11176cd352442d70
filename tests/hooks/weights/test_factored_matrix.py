"""Factored matrices against the same operations on the dense product."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from actstore.hooks.weights.factored_matrix import FactoredMatrix

SHAPES = [
    ((), 5, 2, 7),
    ((), 4, 6, 3),  # inner size the largest
    ((), 4, 4, 4),
    ((), 6, 1, 6),
    ((3,), 3, 8, 3),
    ((2, 3), 7, 2, 5),
    ((2, 3), 6, 3, 6),
]
SQUARE = [shape for shape in SHAPES if shape[1] == shape[3]]


@pytest.fixture(params=SHAPES, ids=str)
def matrix(request: pytest.FixtureRequest) -> FactoredMatrix:
    return make(*request.param)


def make(leading: tuple[int, ...], ldim: int, mdim: int, rdim: int, seed: int = 0) -> FactoredMatrix:
    return FactoredMatrix(
        random(*leading, ldim, mdim, seed=seed), random(*leading, mdim, rdim, seed=seed + 1)
    )


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_shapes_and_products(matrix: FactoredMatrix) -> None:
    product = matrix.A @ matrix.B
    assert matrix.shape == tuple(product.shape)
    assert matrix.ndim == product.ndim
    assert (matrix.ldim, matrix.mdim, matrix.rdim) == (*matrix.A.shape[-2:], matrix.B.shape[-1])
    assert matrix.pair == (matrix.A, matrix.B)
    close(matrix.AB, product)
    close(matrix.T.AB, product.mT)
    assert str(list(matrix.shape)).strip("[]") in repr(matrix)


def test_leading_axes_of_the_factors_are_broadcast() -> None:
    left, right = random(2, 1, 4, 3), random(5, 3, 6)
    matrix = FactoredMatrix(left, right)
    assert matrix.shape == (2, 5, 4, 6)
    close(matrix.AB, left @ right)
    close(matrix[1, 4].AB, left[1, 0] @ right[4])


def test_singular_value_decomposition(matrix: FactoredMatrix) -> None:
    u, s, v = matrix.svd()
    rank = min(matrix.ldim, matrix.mdim, matrix.rdim)
    assert s.shape == (*matrix.shape[:-2], rank)
    close(u @ s.diag_embed() @ v.mT, matrix.AB)
    close(u.mT @ u, torch.eye(rank).expand(*matrix.shape[:-2], -1, -1))
    close(v.mT @ v, torch.eye(rank).expand(*matrix.shape[:-2], -1, -1))
    close(s, torch.linalg.svdvals(matrix.AB)[..., :rank])


def test_the_decomposition_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original: Callable[..., Any] = torch.linalg.svd

    def counted(value: Tensor, **options: Any) -> Any:
        shapes.append(tuple(value.shape))
        return original(value, **options)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    matrix = make((), 50, 2, 40)
    assert matrix.svd() == (matrix.U, matrix.S, matrix.V)
    assert shapes == [(2, 2)]


def test_norm_and_collapsed_factors(matrix: FactoredMatrix) -> None:
    product = matrix.AB
    close(matrix.norm(), torch.linalg.matrix_norm(product))
    close(matrix.collapse_l().mT @ matrix.collapse_l(), product.mT @ product)
    close(matrix.collapse_r() @ matrix.collapse_r().mT, product @ product.mT)
    even = matrix.make_even()
    close(even.AB, product)
    close(even.A.norm(dim=(-2, -1)), even.B.norm(dim=(-2, -1)))


@pytest.mark.parametrize("shape", SQUARE, ids=str)
def test_eigenvalues_are_those_of_the_product(shape: tuple[Any, ...]) -> None:
    matrix = make(*shape)
    close(matrix.BA, matrix.B @ matrix.A)
    eigenvalues = matrix.eigenvalues
    assert eigenvalues.shape == (*matrix.shape[:-2], matrix.mdim)
    # Sums of powers tell eigenvalues apart whatever their order, and zeros add nothing.
    for power in (1, 2, 3):
        expected = torch.linalg.matrix_power(matrix.AB, power).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close((eigenvalues**power).sum(-1).real, expected, atol=1e-2, rtol=1e-3)


def test_times_another(matrix: FactoredMatrix) -> None:
    leading, rdim, ldim = matrix.shape[:-2], matrix.rdim, matrix.ldim
    for inner in (1, 9):
        other = make(leading, rdim, inner, 4, seed=3)
        product = matrix @ other
        close(product.AB, matrix.AB @ other.AB)
        assert product.mdim == min(inner, matrix.mdim, matrix.rdim)
    for right in (random(*leading, rdim, 4), random(rdim, 4)):
        after = matrix @ right
        assert isinstance(after, FactoredMatrix)
        close(after.AB, matrix.AB @ right)
    for left in (random(*leading, 4, ldim), random(4, ldim)):
        before = left @ matrix
        assert isinstance(before, FactoredMatrix)
        close(before.AB, left @ matrix.AB)


def test_vectors_collapse(matrix: FactoredMatrix) -> None:
    right, left = random(matrix.rdim), random(matrix.ldim)
    after, before = matrix @ right, left @ matrix
    assert isinstance(after, Tensor)
    assert isinstance(before, Tensor)
    close(after, matrix.AB @ right)
    close(before, left @ matrix.AB)


@pytest.mark.parametrize("scalar", [2, -0.5, torch.tensor(3.0), torch.tensor([[3.0]])], ids=str)
def test_scalars_on_both_sides(matrix: FactoredMatrix, scalar: float | Tensor) -> None:
    expected = matrix.AB * float(scalar)
    close((matrix * scalar).AB, expected)
    close((scalar * matrix).AB, expected)
    assert (matrix * scalar).shape == matrix.shape


def test_index_of_leading_axes() -> None:
    matrix = make((2, 3), 7, 2, 5)
    product = matrix.AB
    for index in (
        1,
        -1,
        (0, 2),
        slice(1),
        (slice(None), 1),
        ([0, 1], [2, 0]),
        ...,
        (..., 1, slice(None), slice(2)),
    ):
        close(matrix[index].AB, product[index])


def test_index_of_both_sides() -> None:
    matrix = make((2, 3), 7, 2, 5)
    product = matrix.AB
    close(matrix[1, 0, 2:4].AB, product[1, 0, 2:4])
    close(matrix[..., 2:, :3].AB, product[..., 2:, :3])
    close(matrix[0, :, -1, 1].AB, product[0, :, -1:, 1:2])
    close(matrix[0, 0, torch.tensor(3), torch.tensor([4, 0])].AB, product[0, 0, 3:4][:, [4, 0]])
    close(matrix[1, 1, [0, 3, 5], [1, 2]].AB, product[1, 1][[0, 3, 5]][:, [1, 2]])
    close(make((), 5, 2, 7)[3].AB, make((), 5, 2, 7).AB[3:4])


def test_index_out_of_range() -> None:
    matrix = make((2,), 4, 3, 5)
    for index in (2, (0, 4), (0, 0, -6), (0, 0, 0, 0)):
        with pytest.raises(IndexError):
            matrix[index]


def test_unsqueeze_and_corner() -> None:
    matrix = make((4, 5), 6, 2, 7)
    for axis, shape in ((0, (1, 4, 5, 6, 7)), (2, (4, 5, 1, 6, 7)), (-3, (4, 5, 1, 6, 7))):
        assert matrix.unsqueeze(axis).shape == shape
        close(matrix.unsqueeze(axis).AB.reshape(matrix.shape), matrix.AB)
    for axis in (3, -2, -6):
        with pytest.raises(ValueError, match="is not in front of the last two axes"):
            matrix.unsqueeze(axis)
    close(matrix.get_corner(), matrix.AB[:3, :3, :3, :3])
    close(matrix.get_corner(2), matrix.AB[:2, :2, :2, :2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    full = make((3,), 6, 2, 6)
    half = FactoredMatrix(full.A.to(dtype), full.B.to(dtype))
    assert half.AB.dtype == dtype
    wide = FactoredMatrix(half.A.float(), half.B.float())
    assert half.S.dtype == half.norm().dtype == torch.float32
    close(half.S, wide.S)
    close(half.norm(), wide.norm())
    assert half.eigenvalues.dtype == torch.complex64
    assert make((), 3, 2, 3).A.dtype == torch.float32
    assert FactoredMatrix(full.A.double(), full.B.double()).S.dtype == torch.float64


def test_a_product_that_would_not_fit_is_never_formed() -> None:
    n = 1_000_000  # n * n floats would be 4 TB
    matrix = FactoredMatrix(torch.ones(n, 1), torch.ones(1, n))
    assert float(matrix.norm()) == pytest.approx(n)
    assert float(matrix.S) == pytest.approx(n)
    assert float(matrix.eigenvalues.real) == pytest.approx(n)
    collapsed = torch.ones(n) @ matrix
    assert isinstance(collapsed, Tensor)
    close(collapsed, torch.full((n,), float(n)))
    assert (matrix @ matrix).shape == (n, n)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda: FactoredMatrix(torch.ones(3, 4), torch.ones(5, 6)),
            r"inner sizes of the factors differ.*4.*5",
        ),
        (lambda: FactoredMatrix(torch.ones(4), torch.ones(4, 6)), "factors must be matrices"),
        (lambda: make((), 3, 2, 4) @ torch.ones(3, 3), r"shape \(3, 4\) cannot be multiplied by \(3, 3\)"),
        (lambda: make((), 3, 2, 4) @ torch.ones(3), r"shape \(3, 4\) cannot be multiplied by \(3,\)"),
        (lambda: make((), 3, 2, 4) @ make((), 3, 2, 4), r"cannot be multiplied by \(3, 4\)"),
        (lambda: torch.ones(2, 4) @ make((), 3, 2, 4), r"\(2, 4\) cannot be multiplied by a matrix"),
        (lambda: torch.ones(4) @ make((), 3, 2, 4), r"\(4,\) cannot be multiplied by a matrix"),
        (lambda: make((), 3, 2, 4) * torch.ones(3), "only one number can scale"),
        (lambda: make((), 3, 2, 4).BA, "BA needs a square matrix"),
        (lambda: make((), 3, 2, 4).eigenvalues, "BA needs a square matrix"),
    ],
)
def test_wrong_sizes_are_one_sentence(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        wrong()
    assert "\n" not in str(caught.value)


def test_gradients_reach_the_factors() -> None:
    matrix = make((2,), 5, 2, 6)
    matrix.A.requires_grad_()
    gradient = torch.autograd.grad(matrix.norm().sum(), matrix.A)[0]
    leaf = matrix.A.detach().requires_grad_()
    expected = torch.autograd.grad(torch.linalg.matrix_norm(leaf @ matrix.B).sum(), leaf)[0]
    close(gradient, expected)


def test_all_is_as_in_transformerlens(matrix: FactoredMatrix) -> None:
    from transformer_lens import FactoredMatrix as Theirs

    theirs = Theirs(matrix.A, matrix.B)
    other = make(matrix.shape[:-2], matrix.rdim, 3, 4, seed=3)
    right, left = random(matrix.rdim, 4), random(4, matrix.ldim)
    for ours_, theirs_ in (
        (matrix, theirs),
        (matrix @ right, theirs @ right),
        (left @ matrix, left @ theirs),
        (matrix @ other, theirs @ Theirs(other.A, other.B)),
        (matrix * torch.tensor(3.0), theirs * torch.tensor(3.0)),
        (torch.tensor([3.0]) * matrix, torch.tensor([3.0]) * theirs),
        (matrix.T, theirs.T),
        (matrix.make_even(), theirs.make_even()),
    ):
        assert isinstance(ours_, FactoredMatrix)
        for size in ("shape", "ndim", "ldim", "mdim", "rdim", "has_leading_dims"):
            assert getattr(ours_, size) == getattr(theirs_, size), size
        close(ours_.AB, theirs_.AB)
        close(ours_.S, theirs_.S)
        close(ours_.norm(), theirs_.norm())
    with pytest.deprecated_call(match="Vh is V, not its transpose"):
        assert torch.equal(matrix.Vh, matrix.V)
    assert matrix.V.shape == theirs.V.shape


def test_errors_are_those_that_notebooks_catch() -> None:
    from transformer_lens import FactoredMatrix as Theirs

    left, right = random(4, 3), random(3, 5)
    wrong: list[Callable[[Any], Any]] = [
        lambda kind: kind(left, left),
        lambda kind: kind(random(2, 4, 3), random(3, 3, 5)),
        lambda kind: kind(left, right).BA,
        lambda kind: kind(left, right) * random(2),
        lambda kind: kind(left, right) @ random(4, 4),
        lambda kind: random(5, 5) @ kind(left, right),
        lambda kind: kind(left, right)[0, 0, 0],
    ]
    for attempt in wrong:
        with pytest.raises((AssertionError, RuntimeError, ValueError)) as theirs:
            attempt(Theirs)
        with pytest.raises(theirs.type):
            attempt(FactoredMatrix)
