"""Probes that are solved from sums: ridge regression, and the difference of the means of two classes."""

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.solvers.logistic import Scale


def scale_of(
    total: NDArray[np.float64], squares: NDArray[np.float64], n_rows: float, *, standardise: bool
) -> Scale:
    """Mean and standard deviation as scikit-learn's ``StandardScaler`` has them: constant elements are not scaled.

    Args:
        total: sum of the rows, [d].
        squares: sums of the squares of their elements, [d].
        n_rows: number of rows.
        standardise: whether rows are standardised at all.
    """
    mean = total / n_rows
    if not standardise:
        return Scale(np.zeros_like(mean), np.ones_like(mean))
    variance = squares / n_rows - np.square(mean)
    # Below this, the variance is what rounding leaves of equal values.
    rounding = n_rows * np.finfo(np.float64).eps * squares / n_rows
    return Scale(mean, np.sqrt(np.where(variance <= rounding, 1.0, variance)))


def ridge(
    products: NDArray[np.float64], scale: Scale, penalties: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The minimum of half the mean squared error plus half of the penalty times the squared weights.

    Args:
        products: of the row, 1 and what is predicted, [d + 2, d + 2].
        scale: of the rows.
        penalties: [n_problems].

    Returns:
        Weights of standardised rows [d, n_problems], and biases [n_problems].
    """
    n_rows = products[-2, -2]
    mean, mean_y = products[-2, :-2] / n_rows, products[-2, -1] / n_rows
    covariance = products[:-2, :-2] / n_rows - np.outer(mean, mean)
    covariance /= np.outer(scale.deviation, scale.deviation)
    with_y = (products[:-2, -1] / n_rows - mean * mean_y) / scale.deviation
    weights = []
    for penalty in penalties.tolist():
        matrix = covariance.copy()
        matrix[np.diag_indices_from(matrix)] += penalty
        weights.append(np.linalg.solve(matrix, with_y))
    stacked = np.stack(weights, axis=1)
    bias = mean_y - ((mean - scale.mean) / scale.deviation) @ stacked
    return stacked, bias


def mean_squared_error(
    products: NDArray[np.float64], weights: NDArray[np.float64], bias: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The mean squared error of several probes over some rows, [n_problems].

    Args:
        products: of these rows, as for `ridge`.
        weights: [d, n_problems], in units of the stored values.
        bias: [n_problems]
    """
    whole = np.concatenate([weights, bias[None], np.full((1, len(bias)), -1.0)])
    errors: NDArray[np.float64] = (
        np.einsum("ip,ij,jp->p", whole, products, whole, optimize=True) / products[-2, -2]
    )
    return errors


def mean_difference(
    sums: NDArray[np.float64], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """The mean of the second class minus that of the first, which is 0 half-way between them.

    Args:
        sums: of the rows of each class, [2, d].
        counts: rows of each class, [2].

    Returns:
        The direction [d], and the bias.
    """
    first, second = sums / counts[:, None]
    direction = second - first
    return direction, -float(direction @ (first + second)) / 2
