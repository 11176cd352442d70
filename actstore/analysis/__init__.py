"""Analysis reads whole stores: top activations, how good SAEs are, matching sequences, aligned tokens, and how well an
order mixes.

An analysis of rows is a file with a reduction and a function that scans a store with it, as `top_activations` shows;
`scanning` reads. What an extraction counts on its way is in `actstore.store.statistics`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actstore.analysis.dashboards.dashboard import Dashboard, dashboard
    from actstore.analysis.describing.by_token import ByToken, by_token
    from actstore.analysis.describing.co_occurrence import CoOccurrence, co_occurrence
    from actstore.analysis.describing.logit_lens import LogitLens, logit_lens
    from actstore.analysis.feature_activations.activation_examples import (
        ActivationExamples,
        activation_examples,
    )
    from actstore.analysis.feature_activations.statistics import FeatureStatistics, feature_statistics
    from actstore.analysis.geometry.cka import CKA, cka
    from actstore.analysis.geometry.linear_map import LinearMap, linear_map
    from actstore.analysis.geometry.mean_difference import MeanDifference, mean_difference
    from actstore.analysis.geometry.nearest import Nearest, nearest
    from actstore.analysis.geometry.norms import norms
    from actstore.analysis.geometry.norms_result import Norms
    from actstore.analysis.geometry.principal.pca import pca
    from actstore.analysis.geometry.principal.pca_result import PCA, PCAs
    from actstore.analysis.probes.fitting import fit_probe
    from actstore.analysis.probes.probe import Probe
    from actstore.analysis.probes.results import Probes
    from actstore.analysis.sae_evaluation.evaluate import evaluate_sae
    from actstore.analysis.sae_evaluation.held_out import held_out_rows
    from actstore.analysis.sae_evaluation.result import SaeEvaluation
    from actstore.analysis.scanning.scan import Scanned, scan
    from actstore.analysis.top.result import TopActivations
    from actstore.analysis.top.top_activations import top_activations

__all__ = [
    "CKA",
    "PCA",
    "ActivationExamples",
    "ByToken",
    "CoOccurrence",
    "Dashboard",
    "FeatureStatistics",
    "LinearMap",
    "LogitLens",
    "MeanDifference",
    "Nearest",
    "Norms",
    "PCAs",
    "Probe",
    "Probes",
    "SaeEvaluation",
    "Scanned",
    "TopActivations",
    "activation_examples",
    "by_token",
    "cka",
    "co_occurrence",
    "dashboard",
    "evaluate_sae",
    "feature_statistics",
    "fit_probe",
    "held_out_rows",
    "linear_map",
    "logit_lens",
    "mean_difference",
    "nearest",
    "norms",
    "pca",
    "scan",
    "top_activations",
]

# Imported on first use, so that one analysis does not import what the others need.
_HOMES = {
    "ActivationExamples": "actstore.analysis.feature_activations.activation_examples",
    "ByToken": "actstore.analysis.describing.by_token",
    "CKA": "actstore.analysis.geometry.cka",
    "CoOccurrence": "actstore.analysis.describing.co_occurrence",
    "Dashboard": "actstore.analysis.dashboards.dashboard",
    "FeatureStatistics": "actstore.analysis.feature_activations.statistics",
    "LinearMap": "actstore.analysis.geometry.linear_map",
    "LogitLens": "actstore.analysis.describing.logit_lens",
    "MeanDifference": "actstore.analysis.geometry.mean_difference",
    "Nearest": "actstore.analysis.geometry.nearest",
    "Norms": "actstore.analysis.geometry.norms_result",
    "PCA": "actstore.analysis.geometry.principal.pca_result",
    "PCAs": "actstore.analysis.geometry.principal.pca_result",
    "Probe": "actstore.analysis.probes.probe",
    "Probes": "actstore.analysis.probes.results",
    "SaeEvaluation": "actstore.analysis.sae_evaluation.result",
    "Scanned": "actstore.analysis.scanning.scan",
    "TopActivations": "actstore.analysis.top.result",
    "activation_examples": "actstore.analysis.feature_activations.activation_examples",
    "by_token": "actstore.analysis.describing.by_token",
    "cka": "actstore.analysis.geometry.cka",
    "co_occurrence": "actstore.analysis.describing.co_occurrence",
    "dashboard": "actstore.analysis.dashboards.dashboard",
    "evaluate_sae": "actstore.analysis.sae_evaluation.evaluate",
    "feature_statistics": "actstore.analysis.feature_activations.statistics",
    "fit_probe": "actstore.analysis.probes.fitting",
    "held_out_rows": "actstore.analysis.sae_evaluation.held_out",
    "linear_map": "actstore.analysis.geometry.linear_map",
    "logit_lens": "actstore.analysis.describing.logit_lens",
    "mean_difference": "actstore.analysis.geometry.mean_difference",
    "nearest": "actstore.analysis.geometry.nearest",
    "norms": "actstore.analysis.geometry.norms",
    "pca": "actstore.analysis.geometry.principal.pca",
    "scan": "actstore.analysis.scanning.scan",
    "top_activations": "actstore.analysis.top.top_activations",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'actstore.analysis' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
