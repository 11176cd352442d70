"""actstore: cache the activations of language models once, as Zarr v3 on disk or S3, and read them everywhere.

``plan`` counts what a job will write, ``extract`` writes it, ``open`` reads it. ``activations`` does what is needed of
these for prompts.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from actstore._version import __version__

if TYPE_CHECKING:
    import actstore.hooks.lens_functions as utils
    from actstore.extraction.extract import extract
    from actstore.extraction.planning.job import Job
    from actstore.extraction.planning.planning import PlannedRun, plan
    from actstore.extraction.report import Report
    from actstore.extraction.verify import verify
    from actstore.facade import Store
    from actstore.hooks.cache.activation_cache import ActivationCache
    from actstore.hooks.model import HookedModel
    from actstore.hooks.weights.factored_matrix import FactoredMatrix
    from actstore.opening import open_store as open  # noqa: A004 - actstore.open is its name
    from actstore.recalling import activations
    from actstore.store.reading.activations import Activations
    from actstore.store.statistics.hook_statistics import Statistics
    from actstore.store.verifying.findings import Verification

__all__ = [
    "ActivationCache",
    "Activations",
    "FactoredMatrix",
    "HookedModel",
    "Job",
    "PlannedRun",
    "Report",
    "Statistics",
    "Store",
    "Verification",
    "__version__",
    "activations",
    "extract",
    "open",
    "plan",
    "utils",
    "verify",
]

# Imported on first use, so that `actstore --help` and `actstore info` do not wait for torch.
_HOMES = {
    "ActivationCache": ("actstore.hooks.cache.activation_cache", "ActivationCache"),
    "FactoredMatrix": ("actstore.hooks.weights.factored_matrix", "FactoredMatrix"),
    "HookedModel": ("actstore.hooks.model", "HookedModel"),
    "Activations": ("actstore.store.reading.activations", "Activations"),
    "Job": ("actstore.extraction.planning.job", "Job"),
    "PlannedRun": ("actstore.extraction.planning.planning", "PlannedRun"),
    "Report": ("actstore.extraction.report", "Report"),
    "Statistics": ("actstore.store.statistics.hook_statistics", "Statistics"),
    "Store": ("actstore.facade", "Store"),
    "Verification": ("actstore.store.verifying.findings", "Verification"),
    "activations": ("actstore.recalling", "activations"),
    "extract": ("actstore.extraction.extract", "extract"),
    "open": ("actstore.opening", "open_store"),
    "plan": ("actstore.extraction.planning.planning", "plan"),
    "utils": ("actstore.hooks.lens_functions", ""),
    "verify": ("actstore.extraction.verify", "verify"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'actstore' has no attribute {name!r}")
    path, attribute = _HOMES[name]
    module = import_module(path)
    value = getattr(module, attribute) if attribute else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
