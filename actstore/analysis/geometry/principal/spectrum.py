"""Principal components of a covariance, with signs that do not depend on the machine."""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


def principal(covariance: Float64, n_components: int) -> tuple[Float64, Float64]:
    """The eigenvectors with the largest eigenvalues.

    The element of each vector with the largest absolute value, the first of equal ones, is positive. Eigenvalues that
    rounding made negative are 0.

    Args:
        covariance: symmetric matrix [size, size].
        n_components: number of eigenvectors.

    Returns:
        Vectors of length 1 as rows, [n_components, size], and their eigenvalues, largest first, [n_components].
    """
    values, vectors = np.linalg.eigh(covariance)
    chosen = slice(None, -n_components - 1, -1)
    components = np.ascontiguousarray(vectors.T[chosen])
    largest = np.abs(components).argmax(1)
    signs = np.sign(components[np.arange(n_components), largest])
    return components * signs[:, None], np.maximum(values[chosen], 0.0)
