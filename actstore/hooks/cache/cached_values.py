"""A mapping from hook names to values, which also computes values that follow from others."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, Self

from actstore.errors import HookError, ModelError
from actstore.hooks.cache.derived import Derivation, Way, is_one_stream
from actstore.hooks.cache.position import PositionSlice, at_positions, is_one
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.loaded_model import LoadedModel
from actstore.hooks.loading.device import usable_device
from actstore.hooks.naming.hook_points import point_of
from actstore.hooks.naming.listing import listing
from actstore.hooks.naming.names import HookName, HookNames, join, split

if TYPE_CHECKING:
    import torch

    from actstore.hooks.weights.model_weights import Weights

Kind = Literal["activations", "gradients"]

_GRADIENT = "_grad"
"""What follows the name of a hook in the name of a gradient that TransformerLens' ``incl_bwd`` keeps."""
_WHERE = "to names_filter (in a store: to its hooks)"


class CachedValues(Mapping[str, "torch.Tensor"]):
    """Hook values [batch, ...] under every spelling of their names, and values that follow from them.

    ``in``, `keys`, `values`, `items`, ``iter`` and ``len`` count only the values in the cache. Indexing also computes
    values that follow from them by one or two operations, and does not keep them. It does so for activations only,
    since no gradient follows from others by the operations of the forward.
    """

    def __init__(
        self,
        values: Mapping[str, "torch.Tensor"],
        model: LoadedModel | None = None,
        has_batch_dim: bool = True,
        *,
        names: HookNames | None = None,
        cfg: HookedConfig | None = None,
        kind: Kind | None = None,
        edited: Iterable[str] = (),
        positions: "torch.Tensor | None" = None,
    ) -> None:
        """
        Args:
            values: hook values by name.
            model: the model, for methods that need weights.
            has_batch_dim: whether the first axis of the values is the row.
            names: all hooks of the model; None for those of ``model``.
            cfg: its sizes; None for those of ``model``.
            kind: what the values are; None if that is not known. Nothing is computed from them then, since results
                from gradients would be wrong.
            edited: hooks whose values functions may have changed. Values after them in their layer are not computed
                from values before them.
            positions: where the values are of some positions only: the position of each, [row, slot], -1 for slots
                that are not in use; None if they are of all.

        Raises:
            HookError: the model does not have one of the hooks.
            ModelError: there is no model and no names and sizes either; or it is not the model of the values.
        """
        if kind not in ("activations", "gradients", None):
            raise HookError(f"kind is {kind!r}; choose 'activations', 'gradients' or None")
        if names is None or cfg is None:
            if model is None:
                raise ModelError("a cache needs the model of its values; give ActivationCache(values, model)")
            _check_model(model, model.cfg if cfg is None else cfg)
            names, cfg = names or model.names, cfg or model.cfg
        _check_model(model, cfg)
        self.names = names
        self.cache_dict = {self._canonical(name): value for name, value in values.items()}
        self.cfg = cfg
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.kind = kind
        self._edited = frozenset(edited)
        self.positions = positions
        """The position of each slot, int64 [row, slot], -1 for slots that are not in use, whose values are zeros. The
        values have slots in the place of positions then. None if they are of all positions.
        """
        self._derivation = Derivation(names, cfg, self._weights)

    def __getitem__(self, name: HookName) -> "torch.Tensor":
        """The value of a hook.

        Raises:
            HookError: the model does not have the hook; or the cache has neither the value nor those from which it
                follows. It is a KeyError.
            ModelError: the value needs weights, and the cache has no model.
        """
        canonical = self._canonical(name)
        if canonical.endswith(_GRADIENT):
            if canonical not in self.cache_dict:
                raise HookError(
                    f"this cache does not hold {canonical}; run_with_cache keeps it with incl_bwd=True"
                )
            return self.cache_dict[canonical]
        way = self._way(canonical)
        if way is None:
            raise HookError(self._advice(canonical))
        return way.make(*(self.cache_dict[need] for need in way.needs))

    def __contains__(self, name: object) -> bool:
        try:
            return self._canonical(name) in self.cache_dict  # type: ignore[arg-type]
        except HookError:
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn gradients of PyTorch on or off everywhere, as ``torch.set_grad_enabled`` does.

        Runs of a `HookedModel` do not look at it: they have gradients with ``grad=True`` only.
        """
        import torch

        torch.set_grad_enabled(mode)

    def _with(
        self,
        values: Mapping[str, "torch.Tensor"],
        *,
        has_batch_dim: bool | None = None,
        positions: "torch.Tensor | None" = None,
    ) -> Self:
        """A cache of other values of the same run, at the same positions unless others are given."""
        return type(self)(
            values,
            self.model,
            self.has_batch_dim if has_batch_dim is None else has_batch_dim,
            names=self.names,
            cfg=self.cfg,
            kind=self.kind,
            edited=self._edited,
            positions=self.positions if positions is None else positions,
        )

    def __copy__(self) -> Self:
        return self._with(self.cache_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A cache with copies of the values, of the same model."""
        return self._with(copy.deepcopy(self.cache_dict, memo))

    def __getstate__(self) -> dict[str, Any]:
        """What ``torch.save`` keeps: everything but the model; set ``cache.model`` after loading."""
        return {**vars(self), "model": None, "_derivation": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update({"positions": None} | dict(state))  # saved by earlier versions without it
        self._derivation = Derivation(self.names, self.cfg, self._weights)

    # A mapping would compare tensors, which have no truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        layers: dict[tuple[str, tuple[int, ...]], list[int | None]] = defaultdict(list)
        for name, value in self.cache_dict.items():
            layer, leaf = split(name)
            layers[leaf, tuple(value.shape)].append(layer)
        rows = [
            (_listing([join(layer, leaf) for layer in its_layers], self.names), str(list(shape)))
            for (leaf, shape), its_layers in layers.items()
        ]
        width = max((len(names) for names, _ in rows), default=0)
        kinds = {
            f"{str(value.dtype).removeprefix('torch.')} on {value.device}"
            for value in self.cache_dict.values()
        }
        head = f"{type(self).__name__}: {len(self)} hooks of {self.cfg.model_name}"
        lines = [
            ", ".join([head, *sorted(kinds)]),
            *(f"  {names:<{width}}  {shape}" for names, shape in rows),
        ]
        return f"<{chr(10).join(lines)}>"

    def _canonical(self, name: HookName) -> str:
        """The canonical name of a hook, or of the gradient with respect to it (``blocks.0.hook_resid_pre_grad``)."""
        if isinstance(name, str) and name.endswith(_GRADIENT):
            return self.names.one(name.removesuffix(_GRADIENT)) + _GRADIENT
        return name if isinstance(name, str) and name in self.names else self.names.one(name)

    @property
    def has_embed(self) -> bool:
        return "hook_embed" in self.cache_dict

    @property
    def has_pos_embed(self) -> bool:
        return "hook_pos_embed" in self.cache_dict

    def to(self, device: "str | torch.device") -> Self:
        """Move all values to a device, and return this cache itself.

        Raises:
            ModelError: the device is not there.
        """
        device = usable_device(device)
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def remove_batch_dim(self) -> Self:
        """Drop the first axis of all values, and return this cache itself.

        Raises:
            HookError: there is more than one row.
        """
        if self.has_batch_dim:
            rows = self._rows()
            if rows != 1:
                raise HookError(f"remove_batch_dim needs one row, and there are {rows}")
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.positions = None if self.positions is None else self.positions[0]
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: PositionSlice) -> Self:
        """A new cache with some of the rows; for an integer, with that row and no batch axis.

        Raises:
            HookError: there is no such row, or no batch axis.
        """
        if not self.has_batch_dim:
            raise HookError("this cache holds one row without a batch axis, so rows cannot be chosen")
        rows = {
            name: at_positions(value, batch_slice, axis=0, noun="row")
            for name, value in self.cache_dict.items()
        }
        positions = self.positions
        if positions is not None:
            positions = at_positions(positions, batch_slice, axis=0, noun="row")
        return self._with(rows, has_batch_dim=not is_one(batch_slice), positions=positions)

    def _rows(self) -> int:
        return next((value.shape[0] for value in self.cache_dict.values()), 1)

    def _way(self, name: str) -> Way | None:
        """The first way to a value from the values in the cache; None if there is no way."""
        return next(
            (
                way
                for way in self._derivation.ways(name)
                if all(need in self.cache_dict for need in way.needs)
                and self._may_compute(name, way)
                and not self._between(name, way)
            ),
            None,
        )

    def _may_compute(self, name: str, way: Way) -> bool:
        """Whether the way is valid for this kind of values."""
        is_same = name in way.needs or (self.kind == "gradients" and is_one_stream(name, *way.needs))
        return self.kind == "activations" or is_same

    def _between(self, name: str, way: Way) -> set[str]:
        """Edited hooks on the way to a value: a value computed from others lacks the edits."""
        if name in self.cache_dict:
            return set()
        layer, _ = split(name)
        between = {hook for hook in self._edited - set(way.needs) if split(hook)[0] == layer}
        # The stream into the next layer is the one out of this layer, unless a function has changed it in between.
        return between | {need for need in self._edited & set(way.needs) if split(need)[0] != layer}

    def _lacking(self, name: str) -> list[str]:
        """The fewest missing values from which a value that cannot be computed could be computed."""
        ways = self._derivation.ways(name)[1:]
        missing = [[need for need in way.needs if need not in self.cache_dict] for way in ways]
        return min(missing, key=len, default=[])

    def _advice(self, name: str) -> str:
        if self.kind != "activations":
            return (
                f"this cache does not hold {name}, and {why_not_computed(self)}, so it is not computed from other "
                f"values; add {name} to names_filter of the run"
            )
        for way in self._derivation.ways(name):
            between = self._between(name, way)
            if between and all(need in self.cache_dict for need in way.needs):
                return (
                    f"this cache does not hold {name}, and it cannot be computed, since a function was on "
                    f"{min(between)}; add {name} {_WHERE}"
                )
        point, lacking = point_of(name), self._lacking(name)
        others = f"{' and '.join(lacking)}, from which it is computed," if lacking else ""
        if point is not None and point.why_not_stored and lacking:
            add = others
        else:
            add = f"{name}, or {others}" if lacking else name
        return f"this cache does not hold {name}; add {add} {_WHERE}"

    def _weights(self, what: str) -> "Weights":
        return needed_model(self, what).weights


def require(cache: CachedValues, what: str, names: Iterable[str]) -> None:
    """Refuse to go on without these values.

    Raises:
        HookError: some values are neither in the cache nor computable; the message names all of them.
    """
    missing: list[str] = []
    for name in names:
        if cache._way(name) is None:
            if cache.kind != "activations":
                raise HookError(f"{what}: {cache._advice(name)}")
            point = point_of(name)
            too_large = point is not None and point.why_not_stored is not None
            missing += (cache._lacking(name) if too_large else []) or [name]
    if missing:
        for name in missing:
            if "since a function was on" in (advice := cache._advice(name)):
                raise HookError(advice)
        listing = _listing(list(dict.fromkeys(missing)), cache.names)
        raise HookError(f"{what} needs {listing}, which this cache does not hold; add them {_WHERE}")


def check_computes(cache: CachedValues, what: str) -> None:
    """Refuse to compute from values that may not be activations.

    Raises:
        HookError: the values are gradients, or their kind is not known.
    """
    if cache.kind != "activations":
        raise HookError(f"{what} is computed from activations, and {why_not_computed(cache)}")


def why_not_computed(cache: CachedValues) -> str:
    """Why nothing is computed from values that may not be activations, as the end of an error message."""
    if cache.kind == "gradients":
        return "this cache holds gradients"
    return "this cache was made by hand, maybe of gradients; say kind='activations' if it holds activations"


def needed_model(cache: CachedValues, what: str) -> LoadedModel:
    """The model of a cache.

    Raises:
        ModelError: there is none; the message says what needs it.
    """
    if cache.model is None:
        raise ModelError(
            f"{what} needs the weights; pass model=HookedModel.from_pretrained(...), or set it as cache.model"
        )
    return cache.model


def _check_model(model: object, cfg: HookedConfig) -> None:
    if model is None:
        return
    given = getattr(model, "cfg", None)
    if not isinstance(given, HookedConfig):
        raise ModelError(f"model is {type(model).__name__}; wrap it in HookedModel(...)")
    sizes = ("model_type", "n_layers", "d_model", "n_heads", "d_vocab")
    differing = [size for size in sizes if getattr(given, size) != getattr(cfg, size)]
    if differing:
        what = ", ".join(f"{size} {getattr(given, size)} and not {getattr(cfg, size)}" for size in differing)
        raise ModelError(f"these values are of another model than {given.model_name}, which has {what}")


def _listing(names: Iterable[str], known: HookNames) -> str:
    return listing(names, lambda leaf: sum(split(name)[1] == leaf for name in known.all))
