"""A matrix of low rank, kept as the product of its two factors."""
# ruff: noqa: N802, N803, N806 - names of TransformerLens

import operator
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    import torch


class SizesError(ValueError, AssertionError):
    """Factors, or a matrix and another, whose sizes do not fit. TransformerLens raises AssertionError here."""


class IndexTooLongError(IndexError, ValueError):
    """An index with more items than the matrix has axes. TransformerLens raises ValueError here."""


class FactoredMatrix:
    """The matrices A @ B [..., l, r] of A [..., l, m] and B [..., m, r], multiplied only when ``AB`` is read.

    Axes in front of the last two are batches; those of the factors are broadcast. Linear algebra is done in
    float32 where the factors have less.
    """

    def __init__(self, A: "torch.Tensor", B: "torch.Tensor") -> None:
        """Keep the factors; nothing is copied.

        Raises:
            SizesError: the factors cannot be multiplied.
        """
        import torch

        if A.ndim < 2 or B.ndim < 2:
            raise SizesError(
                f"factors must be matrices; these have shapes {tuple(A.shape)} and {tuple(B.shape)}"
            )
        if A.shape[-1] != B.shape[-2]:
            raise SizesError(
                f"inner sizes of the factors differ: A is {tuple(A.shape)}, so {A.shape[-1]}, and B is "
                f"{tuple(B.shape)}, so {B.shape[-2]}"
            )
        leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])  # type: ignore[no-untyped-call]
        self.A = A.expand(*leading, *A.shape[-2:])
        self.B = B.expand(*leading, *B.shape[-2:])

    @property
    def ldim(self) -> int:
        return self.A.shape[-2]

    @property
    def mdim(self) -> int:
        """Inner size, which bounds the rank."""
        return self.A.shape[-1]

    @property
    def rdim(self) -> int:
        return self.B.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the product."""
        return (*self.A.shape[:-1], self.rdim)

    @property
    def has_leading_dims(self) -> bool:
        """Whether there are axes in front of the last two."""
        return self.ndim > 2

    @property
    def ndim(self) -> int:
        return self.A.ndim

    @property
    def pair(self) -> tuple["torch.Tensor", "torch.Tensor"]:
        return self.A, self.B

    @property
    def AB(self) -> "torch.Tensor":
        """The product [..., l, r]."""
        return self.A @ self.B

    @property
    def BA(self) -> "torch.Tensor":
        """The product B @ A [..., m, m], which has the same eigenvalues except for zeros.

        Raises:
            SizesError: l is not r.
        """
        if self.ldim != self.rdim:
            raise SizesError(f"BA needs a square matrix, and the shape is {self.shape}")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        """The transpose of the last two axes."""
        return FactoredMatrix(self.B.mT, self.A.mT)

    @overload
    def __matmul__(self, other: "FactoredMatrix") -> "FactoredMatrix": ...
    @overload
    def __matmul__(self, other: "torch.Tensor") -> "FactoredMatrix | torch.Tensor": ...
    def __matmul__(self, other: "FactoredMatrix | torch.Tensor") -> "FactoredMatrix | torch.Tensor":
        """Multiply by a factored matrix or a tensor [..., r, k]; a vector [r] gives the tensor [..., l].

        Raises:
            SizesError: sizes differ.
        """
        first = other.shape[0] if other.ndim == 1 else other.shape[-2]
        if first != self.rdim:
            raise SizesError(f"a matrix of shape {self.shape} cannot be multiplied by {tuple(other.shape)}")
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        if other.ndim == 1:
            return (self.A @ (self.B @ other[:, None])).squeeze(-1)
        if self.rdim > self.mdim:  # keep the smaller inner size
            return FactoredMatrix(self.A, self.B @ other)
        return FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: "torch.Tensor") -> "FactoredMatrix | torch.Tensor":
        """Multiply a tensor [..., k, l] by this matrix; a vector [l] gives the tensor [..., r].

        Raises:
            SizesError: sizes differ.
        """
        if other.shape[-1] != self.ldim:
            raise SizesError(f"{tuple(other.shape)} cannot be multiplied by a matrix of shape {self.shape}")
        if other.ndim == 1:
            return ((other[None] @ self.A) @ self.B).squeeze(-2)
        if self.ldim > self.mdim:
            return FactoredMatrix(other @ self.A, self.B)
        return FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: "float | torch.Tensor") -> "FactoredMatrix":
        """Multiply by a number, or a tensor that holds one number.

        Raises:
            SizesError: the tensor holds more than one.
        """
        import torch

        if isinstance(scalar, torch.Tensor):
            if scalar.numel() != 1:
                raise SizesError(
                    f"only one number can scale a factored matrix, found shape {tuple(scalar.shape)}"
                )
            scalar = scalar.reshape(())
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """The matrix at an index over [..., l, r], of ints, slices, ellipses, and lists or vectors of ints.

        An int at l or r keeps its axis, of size 1, so that the result is a matrix; l and r are taken apart from the
        axes in front, so that lists at both mean every pair.
        """
        index = index if isinstance(index, tuple) else (index,)
        dots = [at for at, item in enumerate(index) if item is Ellipsis]
        if dots:
            missing = self.ndim - len(index) + 1
            index = (*index[: dots[0]], *[slice(None)] * missing, *index[dots[0] + 1 :])
        if len(index) > self.ndim:
            raise IndexTooLongError(f"{len(index)} indices for a matrix of shape {self.shape}")
        n_leading = self.ndim - 2
        leading, inner = index[:n_leading], index[n_leading:]
        A, B = self.A[leading], self.B[leading]
        if inner:
            A = A[..., _keeping_axis(inner[0], self.ldim), :]
        if len(inner) == 2:
            B = B[..., _keeping_axis(inner[1], self.rdim)]
        return FactoredMatrix(A, B)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape={self.shape}, mdim={self.mdim})"

    def svd(self) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """(U [..., l, k], S [..., k], V [..., r, k]), k the least of l, m, r: the product is U diag(S) V^T."""
        return self._svd

    @property
    def U(self) -> "torch.Tensor":
        """Left singular vectors [..., l, k], in columns."""
        return self._svd[0]

    @property
    def S(self) -> "torch.Tensor":
        """Singular values [..., k], the largest first."""
        return self._svd[1]

    @property
    def V(self) -> "torch.Tensor":
        """Right singular vectors [..., r, k], in columns (not transposed)."""
        return self._svd[2]

    @property
    def Vh(self) -> "torch.Tensor":
        """The same as `V`, under the name that TransformerLens used to give it; it is not transposed, so it warns."""
        import warnings

        warnings.warn("Vh is V, not its transpose; write V, or V.mT", DeprecationWarning, stacklevel=2)
        return self.V

    @cached_property
    def _svd(self) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        import torch

        # A @ B = Q1 (R1 R2^T) Q2^T, and only the small matrix in the middle needs an SVD.
        left, left_r = torch.linalg.qr(_widened(self.A))
        right, right_r = torch.linalg.qr(_widened(self.B).mT)
        u, s, vh = torch.linalg.svd(left_r @ right_r.mT, full_matrices=False)
        return left @ u, s, right @ vh.mT

    @property
    def eigenvalues(self) -> "torch.Tensor":
        """Complex eigenvalues [..., m] of BA, in no particular order: those of the product except for zeros."""
        import torch

        values: torch.Tensor = torch.linalg.eigvals(_widened(self.BA))
        return values

    def norm(self) -> "torch.Tensor":
        """Frobenius norm [...] of the product."""
        import torch

        _, left_r = torch.linalg.qr(_widened(self.A))
        _, right_r = torch.linalg.qr(_widened(self.B).mT)
        norms: torch.Tensor = torch.linalg.matrix_norm(left_r @ right_r.mT)
        return norms

    def make_even(self) -> "FactoredMatrix":
        """The same matrix with factors of equal norm: U sqrt(S) and sqrt(S) V^T."""
        root = self.S.sqrt()
        return FactoredMatrix(self.U * root[..., None, :], root[..., None] * self.V.mT)

    def collapse_l(self) -> "torch.Tensor":
        """S V^T [..., k, r]: the product turned from the left, with the same products of its columns."""
        return self.S[..., None] * self.V.mT

    def collapse_r(self) -> "torch.Tensor":
        """U S [..., l, k]: the product turned from the right, with the same products of its rows."""
        return self.U * self.S[..., None, :]

    def unsqueeze(self, k: int) -> "FactoredMatrix":
        """Insert an axis of size 1 at ``k``, in front of the last two.

        Raises:
            SizesError: ``k`` is not in front of the last two axes.
        """
        axis = k if k >= 0 else k + self.ndim + 1
        if not 0 <= axis <= self.ndim - 2:
            raise SizesError(f"axis {k} is not in front of the last two axes of shape {self.shape}")
        return FactoredMatrix(self.A.unsqueeze(axis), self.B.unsqueeze(axis))

    def get_corner(self, k: int = 3) -> "torch.Tensor":
        """The first ``k`` entries of the product along every axis, to have a look at it."""
        corner = (slice(k),) * (self.ndim - 1)
        return self.A[corner] @ self.B[(*corner[:-1], slice(None), slice(k))]


def _widened(value: "torch.Tensor") -> "torch.Tensor":
    """The value in float32, if it has less precision: PyTorch decomposes no half-precision matrices."""
    return value.float() if value.dtype.itemsize < 4 else value


def _keeping_axis(index: Any, size: int) -> Any:
    if getattr(index, "ndim", 0) != 0 or not hasattr(index, "__index__"):
        return index
    at = operator.index(index)
    if not -size <= at < size:
        raise IndexError(f"index {at} is out of range for an axis of size {size}")
    return slice(at % size, at % size + 1)
