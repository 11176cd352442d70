"""Taking from a store's statistics what SAELens would estimate from a thousand batches."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.integrations.saelens.installed import check_installed
from actstore.integrations.saelens.metadata import metadata
from actstore.integrations.saelens.provider import DataProvider
from actstore.loader.dropping.drop import Drop
from actstore.loader.dropping.valid_rows import ValidRows
from actstore.store.committed_store import CommittedStore
from actstore.store.statistics.hook_statistics import Statistics

_SAMPLE: Final = 1 << 16
_MIN_SEQUENCES, _MAX_SEQUENCES = 128, 4096
"""About how many rows are sampled for a mean norm where some are dropped, and the least and most sequences that they
are in. The mean is then off by less than a 64th of the norms' standard deviation.
"""
_BLOCK_NBYTES: Final = 1 << 26
"""Bytes of activations that are read together."""
_EPS: Final = 1e-3
"""The number that SAELens adds to the eigenvalues of the covariance."""


def prepare(trainer: Any, provider: DataProvider) -> None:
    """Prepare a trainer to fit: no batch is spent on estimates, and the saved SAE says where its data come from.

    The mean norm and the covariance are those of all tokens in the store. If rows are dropped, the mean norm is
    estimated from about 65,536 of the other rows, in sequences spread over the store, the same on all ranks; whitening
    is then left to SAELens, as it is if the store has no covariance, which takes ``n_batches_for_norm_estimate``
    batches. What is set already stays.

    Args:
        trainer: an ``SAETrainer`` or ``MultiSAETrainer`` that was made with this provider.
        provider: the provider of its batches.

    Raises:
        LoaderError: the trainer's batch size, a hook or a d_in differs from that of the provider; or an SAE has
            more active latents (k) than latents.
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
        # SAELens takes any k, and torch's topk fails in the first step.
        k = getattr(part.sae.cfg, "k", 0)
        if k > part.sae.cfg.d_sae:
            raise LoaderError(
                f"k of the SAE is {k}, and it has only {part.sae.cfg.d_sae} latents; choose a smaller k, or a "
                "larger d_sae"
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
        for name, value in metadata(provider.loader, hook).items():
            setattr(part.sae.cfg.metadata, name, value)


def parts_of(trainer: Any, provider: DataProvider) -> Iterator[tuple[Any, str]]:
    """The trainer of each SAE, and the name of its hook.

    Raises:
        LoaderError: the provider does not give the batches that this trainer takes.
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
    """Whether rows are dropped that the statistics of the store include."""
    return bool(drop.tokens) or any(one is not None for one in (drop.positions, drop.max_norm, drop.mask))


def _mean_norms(provider: DataProvider, hooks: Sequence[str]) -> dict[str, float]:
    if not hooks:
        return {}
    if not _drops_tokens(provider.loader.options.drop):
        return {hook: provider.store.stats(hook).mean_norm for hook in hooks}
    valid, length = provider.loader.valid_rows, provider.store.shape[1]
    sequences, weights = _sampled_sequences(valid, length)
    return {
        hook: float(np.average(_norms_by_sequence(provider.store, hook, valid, sequences), weights=weights))
        for hook in hooks
    }


def _sampled_sequences(valid: ValidRows, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sequences to sample, ascending, and the weight of each one's mean.

    They are the sequences of evenly spaced valid rows, as many as sequences are wanted, so that a sequence is chosen in
    proportion to its valid rows. If that does not read more, all valid rows are used, and the mean is exact.
    """
    n_sequences = valid.n_rows // length
    wanted = _SAMPLE // max(1, valid.n_valid // n_sequences)
    n_chosen = min(max(wanted, _MIN_SEQUENCES), _MAX_SEQUENCES, valid.n_valid)
    ranks = np.arange(n_chosen) * valid.n_valid // n_chosen
    if n_sequences <= n_chosen:
        ranks = np.arange(valid.n_valid)
    sequences, weights = np.unique(valid.select(ranks) // length, return_counts=True)
    return sequences, weights


def _norms_by_sequence(
    store: CommittedStore, hook: str, valid: ValidRows, sequences: NDArray[np.int64]
) -> NDArray[np.float64]:
    """The mean norm of the valid rows of each of these sequences."""
    acts, length = store[hook], store.shape[1]
    first, end = (valid.rank((sequences + side) * length) for side in (0, 1))
    places = [valid.select(np.arange(*ranks)) % length for ranks in zip(first, end, strict=True)]
    kept = slice(min(int(here[0]) for here in places), max(int(here[-1]) for here in places) + 1)
    step = max(1, _BLOCK_NBYTES // (acts.nbytes // max(1, len(acts)) + 1))
    means = []
    for start in range(0, len(sequences), step):
        values = acts[sequences[start : start + step].tolist(), kept].flatten(2).float().norm(dim=2).double()
        means += [
            float(norms[torch.from_numpy(here - kept.start)].mean())
            for norms, here in zip(values, places[start : start + step], strict=True)
        ]
    return np.array(means)


def _whitening(statistics: Statistics) -> Any:
    """SAELens' ``ActivationWhitening`` in float64, or None without a covariance."""
    from sae_lens.training.activation_scaler import ActivationWhitening

    covariance = statistics.covariance
    if covariance is None:
        return None
    # SAELens divides by the number of tokens less one.
    values, vectors = np.linalg.eigh(covariance * (statistics.count / max(1, statistics.count - 1)))
    values = np.maximum(values, 0.0) + _EPS
    return ActivationWhitening(
        mean=torch.from_numpy(statistics.mean.reshape(-1).copy()),
        matrix=torch.from_numpy(np.ascontiguousarray(vectors / np.sqrt(values))),
        inverse_matrix=torch.from_numpy(np.ascontiguousarray(np.sqrt(values)[:, None] * vectors.T)),
    )
