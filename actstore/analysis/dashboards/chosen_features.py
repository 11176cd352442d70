"""The features that a dashboard shows, their numbers, and their directions where they write to the stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.features import Directions, Encoded, Features, Neurons, features_of
from actstore.errors import JobError


@dataclass(frozen=True)
class ChosenFeatures:
    """Features of a hook."""

    features: Features
    numbers: NDArray[np.int64] | None
    """Number of each feature, ascending, [n_features]; None for all of those that are computed."""
    decoder: NDArray[np.float32] | None
    """Direction of each feature [n_features, d]; None if it is not known."""

    @classmethod
    def of(cls, of: Any, shape: Sequence[int], chosen: "Sequence[int] | range | None") -> "ChosenFeatures":
        """Choose features.

        Args:
            of: directions, neurons, an SAE or a function, as for `top_activations`.
            shape: shape of the hook at one position.
            chosen: numbers of the features; None for all.

        Raises:
            JobError: they are not features of the hook, or there are none with these numbers.
        """
        features = features_of(of, shape)
        decoder = _decoder(features, int(np.prod(shape)))
        if isinstance(features, Neurons):
            # A list of neurons is itself a choice; its numbers are those of the neurons.
            wanted = features.neurons if chosen is None else _numbers(chosen)
            missing = sorted(set(wanted) - set(features.neurons))
            if missing:
                raise JobError(
                    f"feature {missing[0]} is none of the neurons; choose among them, or give others"
                )
            numbers = np.array(sorted(set(wanted)), np.int64)
            neurons = Neurons(tuple(numbers.tolist()))
            return cls(neurons, numbers, _decoder(neurons, int(np.prod(shape))))
        if chosen is None:
            return cls(features, None, decoder)
        numbers = np.array(_numbers(chosen), np.int64)
        if decoder is None and not isinstance(features, Encoded):
            raise JobError("features of a function cannot be chosen; let it give only those that you want")
        n_features = None if decoder is None else len(decoder)
        if n_features is not None and numbers[-1] >= n_features:
            raise JobError(f"feature {numbers[-1]} was chosen, and there are {n_features}, from 0")
        part = None if decoder is None else decoder[numbers]
        if isinstance(features, Encoded):
            latents = tuple(numbers.tolist())
            if features.latents is not None:
                latents = tuple(features.latents[number] for number in latents)
            return cls(Encoded(features.sae, latents), numbers, part)
        assert part is not None
        return cls(Directions(np.ascontiguousarray(part)), numbers, part)


def _numbers(chosen: "Sequence[int] | range") -> tuple[int, ...]:
    """Numbers of features, ascending, each once."""
    given = np.asarray(chosen)
    if given.ndim != 1 or given.dtype.kind not in "iu" or not given.size or given.min() < 0:
        raise JobError("features must be a list or range of numbers, from 0, with one at least")
    return tuple(np.unique(given).tolist())


def _decoder(features: Features, size: int) -> NDArray[np.float32] | None:
    """The direction of each feature, [n_features, d]: rows of the decoder of an SAE, or the directions themselves."""
    if isinstance(features, Directions):
        return features.directions
    if isinstance(features, Neurons):
        return np.eye(size, dtype=np.float32)[list(features.neurons)] if size <= 1 << 13 else None
    if not isinstance(features, Encoded):
        return None
    sae = features.sae
    if hasattr(sae, "W_dec"):  # SAELens, [n_features, d]
        weight = sae.W_dec
    elif hasattr(getattr(sae, "decoder", None), "weight"):  # dictionary_learning, [d, n_features]
        weight = sae.decoder.weight.T
    else:
        return None
    decoder: NDArray[np.float32] = weight.detach().float().cpu().numpy()
    if decoder.ndim != 2:
        return None
    return decoder if features.latents is None else decoder[list(features.latents)]
