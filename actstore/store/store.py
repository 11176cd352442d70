"""A store, open for reading."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.errors import HookError, NotCommittedError, StorageError
from actstore.store.activations import Activations
from actstore.store.blobs import Blobs, open_blobs
from actstore.store.commit import PLAN_KEY, TOKENS_KEY, committed, read_plan
from actstore.store.plan import HookArray, Plan
from actstore.store.rows import Rows

if TYPE_CHECKING:
    import zarr


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

    def __getitem__(self, hook: str | tuple[str, int]) -> Activations:
        """The activations of a hook: its name, or ``("resid_post", 5)``.

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

    def _find(self, hook: str | tuple[str, int]) -> HookArray:
        name = hook if isinstance(hook, str) else _long_name(hook, self.plan.request.model.n_layers)
        by_name = {stored.name: stored for stored in self.plan.request.hooks}
        layer, leaf = _layer_and_leaf(name)
        if name not in by_name and leaf == "hook_resid_pre" and layer > 0:
            name = f"blocks.{layer - 1}.hook_resid_post"
        if name not in by_name:
            raise HookError(f"{self.url} does not hold {hook!r}; it holds {', '.join(self.hooks)}")
        return by_name[name]

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


def _long_name(short: tuple[str, int], n_layers: int) -> str:
    """``("resid_post", 5)`` as ``blocks.5.hook_resid_post``; -1 is the last layer of the model."""
    name, layer = short
    return f"blocks.{layer + n_layers if layer < 0 else layer}.hook_{name}"


def _layer_and_leaf(name: str) -> tuple[int, str]:
    parts = name.split(".", 2)
    if len(parts) == 3 and parts[0] == "blocks" and parts[1].isdecimal():
        return int(parts[1]), parts[2]
    return -1, name
