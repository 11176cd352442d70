"""A store, open for reading."""

import contextlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.hooks.names import HookName, each_name, long_name, stored_as
from actstore.store.activations import Activations
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.commit import PLAN_KEY, TOKENS_KEY, committed, read_plan
from actstore.store.plan import HookArray, Plan
from actstore.store.rows import Rows

if TYPE_CHECKING:
    import zarr

    from actstore.hooks.cache import ActivationCache
    from actstore.hooks.config import HookedConfig
    from actstore.hooks.model import HookedModel
    from actstore.hooks.names import HookNames


class Store:
    """Committed activations of one model over one set of tokens. Open one with `actstore.open`.

    A store that is still being written can be read: what is committed is there, all else raises.
    """

    def __init__(self, blobs: Blobs, plan: Plan) -> None:
        self.plan = plan
        self.url = blobs.url
        self._blobs = blobs
        self._committed: set[int] = set()
        self._has_tokens = False
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is committed."""
        self._committed = committed(self._blobs, self.plan.n_segments)
        self._has_tokens = self._blobs.size(TOKENS_KEY) is not None

    @property
    def hooks(self) -> tuple[str, ...]:
        """Names of the stored hooks, in model order."""
        return self.plan.hook_names

    @property
    def shape(self) -> tuple[int, int]:
        """(sequences, positions) of every array."""
        return self.plan.n_sequences, self.plan.context_length

    @property
    def metadata(self) -> dict[str, Any]:
        """The plan as plain data: model, tokens, packing, hooks, dtype, batch shape."""
        fields: dict[str, Any] = json.loads(self.plan.to_bytes())
        return fields

    @property
    def n_committed(self) -> int:
        """Committed segments, out of ``plan.n_segments``."""
        return len(self._committed)

    @property
    def is_complete(self) -> bool:
        return self.n_committed == self.plan.n_segments

    def committed_rows(self) -> NDArray[np.bool_]:
        """[n_sequences] True where every hook of the sequence can be read."""
        rows = np.zeros(self.plan.n_sequences, dtype=bool)
        for index in self._committed:
            segment = self.plan.segment(index)
            rows[segment.start : segment.stop] = True
        return rows

    def __getitem__(self, hook: HookName) -> Activations:
        """The activations of a hook, whose name can be spelled as everywhere: ``("resid_post", 5)``, ...

        ``blocks.5.hook_resid_pre`` is served from ``blocks.4.hook_resid_post``, the same tensor.

        Raises:
            HookError: this store does not hold it.
        """
        found = self._find(hook)
        layout = self.plan.activations(found)
        rows = Rows(self._blobs, layout, self._committed.__contains__)
        return Activations(found.name, rows, self._blobs.url)

    def __contains__(self, hook: object) -> bool:
        try:
            self._find(hook)  # type: ignore[arg-type]
        except (HookError, TypeError, ValueError):
            return False
        return True

    def __iter__(self) -> Any:
        return iter(self.hooks)

    def _find(self, hook: HookName) -> HookArray:
        by_name = {stored.name: stored for stored in self.plan.request.hooks}
        name = stored_as(long_name(hook, self.plan.request.model.n_layers))
        if name not in by_name:
            # Only other spellings need to know the model, which takes transformers.
            with contextlib.suppress(HookError):
                name = stored_as(self.names.one(hook))
        if name not in by_name:
            raise HookError(f"{self.url} does not hold {hook!r}; it holds {', '.join(self.hooks)}")
        return by_name[name]

    def _matching(self, pattern: HookName) -> list[HookArray]:
        """Stored hooks that a name or a glob selects; one at least."""
        if not isinstance(pattern, str) or "*" not in pattern:
            return [self._find(pattern)]
        chosen = {stored_as(name) for name in self.names.select(pattern)}
        found = [stored for stored in self.plan.request.hooks if stored.name in chosen]
        if not found:
            raise HookError(f"{self.url} does not hold {pattern!r}; it holds {', '.join(self.hooks)}")
        return found

    @property
    def names(self) -> "HookNames":
        """All hooks of the model, stored or not."""
        names, _ = self._model_hooks
        return names

    @cached_property
    def _model_hooks(self) -> "tuple[HookNames, HookedConfig]":
        from transformers import AutoConfig

        from actstore.hooks.model_names import hooks_of

        fields: dict[str, Any] = dict(self.plan.request.model.config)
        return hooks_of(AutoConfig.for_model(**fields))

    def cache(
        self,
        sequences: int | slice | Sequence[int],
        *,
        names_filter: "HookName | Sequence[HookName] | None" = None,
        model: "HookedModel | None" = None,
    ) -> "ActivationCache":
        """The stored values of some sequences, as `HookedModel.run_with_cache` gives them for the same tokens.

        Args:
            sequences: rows of the store.
            names_filter: hooks to read, names or globs; None for all that are stored.
            model: for methods of the cache that need weights.

        Raises:
            HookError: a hook is not stored.
            NotCommittedError: a row is not committed.
        """
        from actstore.hooks.cache import ActivationCache
        from actstore.hooks.point import point_of

        names, cfg = self._model_hooks
        rows = [sequences] if isinstance(sequences, int) else sequences
        wanted = self.hooks
        if names_filter is not None:
            patterns = each_name(names_filter)
            chosen = {found.name for pattern in patterns for found in self._matching(pattern)}
            wanted = tuple(name for name in self.hooks if name in chosen)
        values = {}
        for name in wanted:
            point = point_of(name)
            axis = 1 if point is None else point.position_axis
            values[name] = self[name][rows].movedim(1, axis)
        return ActivationCache(values, names=names, cfg=cfg, model=model)

    @property
    def tokens(self) -> Rows:
        """Token ids, int32 [n_sequences, context_length], padding included."""
        return self._token_rows("tokens")

    @property
    def lengths(self) -> Rows:
        """Real tokens in each sequence, int32 [n_sequences]."""
        return self._token_rows("lengths")

    @property
    def documents(self) -> Rows:
        """Document each token came from, int64 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("documents")

    @property
    def offsets(self) -> Rows:
        """Place of each token in its document, int32 [n_sequences, context_length]; -1 for inserted tokens."""
        return self._token_rows("offsets")

    def _token_rows(self, path: str) -> Rows:
        if not self._has_tokens:
            raise NotCommittedError(
                f"the tokens of {self.url} are not committed; run the extraction again to complete them"
            )
        layout = next(layout for layout in self.plan.token_arrays() if layout.path == path)
        return Rows(self._blobs, layout, lambda _: True)

    @property
    def zarr(self) -> "zarr.Group":
        """The same store through zarr-python. It shows rows that are not committed as NaN."""
        import zarr

        import actstore.store.bfloat16  # noqa: F401 - registers the type

        return zarr.open_group(self.url, mode="r")

    def __repr__(self) -> str:
        model = self.plan.request.model.name
        n, length = self.shape
        state = "complete" if self.is_complete else f"{self.n_committed}/{self.plan.n_segments} segments"
        return (
            f"<actstore.Store {self.url}: {model}, {len(self.hooks)} hooks, {n} x {length} tokens, {state}>"
        )


def open_store(url: str) -> Store:
    """Open the store below a path or URL; exported as `actstore.open`.

    Raises:
        StorageError: there is no store, or it cannot be read.
    """
    blobs = open_blobs(str(url))
    plan = read_plan(blobs)
    if plan is None:
        raise StorageError(f"there is no actstore store at {blobs.url} ({PLAN_KEY} does not exist)")
    return Store(blobs, plan)
