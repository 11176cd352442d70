"""Attention: patterns have no statistics, and scores are -Inf by design."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from sklearn import decomposition

from actstore import analysis
from actstore.errors import JobError
from actstore.facade import Store
from tests.analysis.geometry.conftest import extracted, real_rows

SCORES, PATTERN = "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_pattern"


@pytest.fixture(scope="module")
def store(tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("attention")
    return extracted(folder, tiny_model("gpt2"), hooks=[SCORES, PATTERN], covariance=True)


def test_patterns_have_principal_components(store: Store) -> None:
    ours = analysis.pca(store, PATTERN, 3)
    assert not ours.is_from_statistics
    theirs = decomposition.PCA(3, svd_solver="full").fit(real_rows(store, PATTERN))
    np.testing.assert_allclose(ours.explained_variance, theirs.explained_variance_, rtol=1e-9)


@pytest.mark.parametrize(
    "ask",
    [
        lambda store: analysis.pca(store, SCORES),
        lambda store: analysis.cka(store, SCORES),
        lambda store: analysis.linear_map(store, PATTERN, SCORES),
        lambda store: analysis.mean_difference(store, SCORES, slice(5), slice(5, None)),
        lambda store: analysis.nearest(store, SCORES, np.ones((4, 64))),
        lambda store: analysis.norms(store, SCORES),
    ],
    ids=["pca", "cka", "linear_map", "mean_difference", "nearest", "norms"],
)
def test_scores_have_no_sums(ask: Callable[[Store], Any], store: Store) -> None:
    with pytest.raises(JobError, match="is -Inf where .*; choose blocks.0.attn.hook_pattern"):
        ask(store)
