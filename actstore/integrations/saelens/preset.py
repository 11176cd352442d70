"""What SAELens would estimate from a thousand batches, taken from the statistics of the store."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from actstore.errors import LoaderError
from actstore.integrations.saelens.installed import check_installed
from actstore.integrations.saelens.metadata import metadata
from actstore.integrations.saelens.provider import DataProvider
from actstore.loader.batch import Batch
from actstore.loader.drop import Drop
from actstore.loader.loader import Loader
from actstore.store.statistics import Statistics

_SAMPLE: Final = 1 << 16
"""Rows that are looked at where some are dropped: a mean norm is then off by a 256th of the norms' deviation."""
_EPS: Final = 1e-3
"""That SAELens adds to the eigenvalues of the covariance."""


def prepare(trainer: Any, provider: DataProvider) -> None:
    """Make a trainer ready to fit: no batch is spent on estimates, and the saved SAE says where it comes from.

    The mean norm and the covariance are those of all tokens in the store. With rows dropped, the mean norm is that of
    65,536 rows that are left, which are looked at aside, and whitening is left to SAELens, as it is where the store has
    no covariance: that takes ``n_batches_for_norm_estimate`` batches. What is set already stays.

    Args:
        trainer: an ``SAETrainer`` or ``MultiSAETrainer`` that was made with this provider.
        provider: where its batches come from.

    Raises:
        LoaderError: the trainer's batch size, a hook or a d_in is not that of the provider.
        MissingExtraError: SAELens is not installed.
        StorageError: statistics or rows cannot be read.
    """
    check_installed()
    parts = list(parts_of(trainer, provider))
    wanted = trainer.cfg.train_batch_size_samples
    if wanted != provider.batch_size:
        raise LoaderError(
            f"train_batch_size_samples is {wanted}, and batches have {provider.batch_size} rows; make them equal"
        )
    for part, hook in parts:
        if part.sae.cfg.d_in != provider.d_in[hook]:
            raise LoaderError(
                f"d_in of the SAE is {part.sae.cfg.d_in}, and rows of {hook} have {provider.d_in[hook]} elements; make "
                f"the SAE with d_in={provider.d_in[hook]}"
            )
    drop = provider.loader.options.drop
    normed = [
        (part, hook)
        for part, hook in parts
        if part.sae.cfg.normalize_activations == "expected_average_only_in"
        and part.activation_scaler.scaling_factor is None
    ]
    norms = _mean_norms(provider, [hook for _, hook in normed])
    for part, hook in normed:
        part.activation_scaler.scaling_factor = math.sqrt(provider.d_in[hook]) / norms[hook]
    for part, hook in parts:
        is_whitened = part.sae.cfg.normalize_activations == "covariance_whitening"
        if is_whitened and part.activation_scaler.whitening is None and not _drops_tokens(drop):
            part.activation_scaler.whitening = _whitening(provider.store.stats(hook))
        for name, value in metadata(provider.store, hook, drop).items():
            setattr(part.sae.cfg.metadata, name, value)


def parts_of(trainer: Any, provider: DataProvider) -> Iterator[tuple[Any, str]]:
    """The trainer of each SAE, and the name of its hook.

    Raises:
        LoaderError: the provider does not give what this trainer takes.
    """
    is_multi = hasattr(trainer, "trainers")
    if is_multi == provider.loader.options.is_single:
        taken, remedy = ("several hooks", "a list of hooks") if is_multi else ("one hook", "one name")
        raise LoaderError(
            f"{type(trainer).__name__} takes batches of {taken}, and the provider was made for "
            f"{', '.join(provider.hooks)}; make it with {remedy}"
        )
    if not is_multi:
        yield trainer, provider.hooks[0]
        return
    for name, part in trainer.trainers.items():
        hook = trainer.hook_names[name]
        if hook not in provider.hooks:
            raise LoaderError(
                f"the SAE {name} is to be trained on {hook}, and batches hold {', '.join(provider.hooks)}; name one of "
                "these in hook_names"
            )
        yield part, hook


def _drops_tokens(drop: Drop) -> bool:
    """Whether rows are left out that the statistics of the store are of."""
    return bool(drop.tokens) or any(one is not None for one in (drop.positions, drop.max_norm, drop.mask))


def _mean_norms(provider: DataProvider, hooks: Sequence[str]) -> dict[str, float]:
    if not hooks:
        return {}
    if not _drops_tokens(provider.loader.options.drop):
        return {hook: provider.store.stats(hook).mean_norm for hook in hooks}
    # All ranks look at the same rows. A loader of its own leaves the provider where it is.
    options = replace(provider.loader.options, rank=0, world_size=1, prefetch=0, epochs=1, drop_last=False)
    totals, n_rows = dict.fromkeys(hooks, 0.0), 0
    with Loader(provider.store, options) as loader:
        for batch in loader:
            assert not isinstance(batch, Batch)
            for hook in hooks:
                rows = batch if isinstance(batch, torch.Tensor) else batch[hook]
                totals[hook] += float(rows.flatten(1).float().norm(dim=1).double().sum())
            n_rows += len(rows)
            if n_rows >= _SAMPLE:
                break
    return {hook: total / n_rows for hook, total in totals.items()}


def _whitening(statistics: Statistics) -> Any:
    """SAELens' ``ActivationWhitening`` in float64, or None without a covariance."""
    from sae_lens.training.activation_scaler import ActivationWhitening

    covariance = statistics.covariance
    if covariance is None:
        return None
    # SAELens divides by one token less.
    values, vectors = np.linalg.eigh(covariance * (statistics.count / max(1, statistics.count - 1)))
    values = np.maximum(values, 0.0) + _EPS
    return ActivationWhitening(
        mean=torch.from_numpy(statistics.mean.reshape(-1).copy()),
        matrix=torch.from_numpy(np.ascontiguousarray(vectors / np.sqrt(values))),
        inverse_matrix=torch.from_numpy(np.ascontiguousarray(np.sqrt(values)[:, None] * vectors.T)),
    )
