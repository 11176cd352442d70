"""Recognising runs whose values may be wrong because of a fault of the version that made them."""

from typing import Final

from actstore.hooks.naming.names import layers_needed
from actstore.store.format.plan import Plan
from actstore.store.records.commit import CommitRecord

_COMPUTE_WITH_THE_NUMBER_OF_LAYERS: Final = ("minicpm3", "minimax")
"""Model types of transformers whose layers compute with the number of layers. They were found by reading the code and
by loading every type with a lower number.
"""


def doubt(plan: Plan, first: CommitRecord) -> str | None:
    """The reason why the values of a run may be wrong; None if there is no such reason.

    Versions that left out layers by lowering ``num_hidden_layers`` did not record which model golden sequences were
    compared with.

    Args:
        plan: plan of the run.
        first: commit record of its segment 0.
    """
    model = plan.request.model
    is_older = first.golden is not None and first.golden.reference is None
    n_loaded = layers_needed(plan.hook_names, model.n_layers)
    if not is_older or n_loaded == model.n_layers:
        return None
    if model.model_type not in _COMPUTE_WITH_THE_NUMBER_OF_LAYERS:
        return None
    return (
        f"may hold wrong values: {model.model_type} computes with the number of its layers, and actstore "
        f"{first.environment.actstore} ran the first {n_loaded} of {model.n_layers} as if there were no more; compare "
        "with the model by verify --deep, or extract again to another place"
    )
