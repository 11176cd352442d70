"""Where rows come from: a hook of the store that is scanned, or of another store over the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Final

from actstore.analysis.scanning.block import Block, rows_of
from actstore.errors import JobError
from actstore.loader.pair import check_tokens
from actstore.store.statistics.moments import has_statistics
from actstore.store.statistics.not_finite import is_masked_by_design

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

MAX_SIZE: Final = 16_384
"""The most elements of a row: a matrix of products takes 2 GiB then."""


@dataclass(frozen=True)
class Source:
    """A hook whose rows are taken."""

    hook: str
    size: int
    """Elements of a row."""
    other: "CommittedStore | None" = None
    """The other store that has it; None for the one that is scanned."""

    @property
    def identity(self) -> str:
        """A text that differs for other values."""
        return self.hook if self.other is None else f"{self.hook} of {self.other.identity}"

    def rows(self, block: Block) -> "torch.Tensor":
        """Its values at the rows of a block, in the stored dtype, [n_rows, size]."""
        if self.other is None:
            return block.values(self.hook).flatten(1)
        key = (self.identity, 0)
        if key not in block.known:
            first, last = int(block.sequences[0]), int(block.sequences[-1])
            read = self.other[self.hook][first : last + 1]
            block.known[key] = rows_of(read, block.addresses - first * block.width).flatten(1)
        return block.known[key]  # type: ignore[no-any-return]


def source_of(store: "CommittedStore", hook: "HookName", other: "CommittedStore | None" = None) -> Source:
    """A hook of a store, or of another store if that is given.

    Raises:
        HookError: the hook is not stored.
        JobError: its rows are too large for products of them, or are not finite by design.
    """
    array = (other or store).array_of(hook)
    check_finite(array.name)
    size = prod(array.shape)
    if size > MAX_SIZE:
        raise JobError(
            f"rows of {array.name} have {size:,} elements, and products of rows are computed for up to {MAX_SIZE:,}; "
            "choose a smaller hook"
        )
    return Source(array.name, size, other)


def check_finite(hook: str) -> None:
    """See that sums of the rows of a hook mean something.

    Raises:
        JobError: its values are -Inf by design where a position does not attend to another one.
    """
    if is_masked_by_design(hook):
        raise JobError(
            f"{hook} is -Inf where a position does not attend to another one, and so are all sums of it; choose "
            f"{hook.replace('hook_attn_scores', 'hook_pattern')}"
        )


def over_same_tokens(store: "CommittedStore", other: "CommittedStore | None") -> "CommittedStore | None":
    """The other store, after its tokens were compared; None if there is none, or it is the same object.

    Raises:
        LoaderError: it has other tokens.
    """
    if other is None or other is store:
        return None
    check_tokens(store, other)
    return other


def may_have_not_finite(source: Source, store: "CommittedStore") -> bool:
    """Whether some of its rows may hold NaN or infinity, from the statistics of the store."""
    of = source.other or store
    if not has_statistics(of.array_of(source.hook)):
        return True
    return bool(of.not_finite(source.hook, most_segments=1))


def hooks_matching(store: "CommittedStore", hooks: "HookName | Sequence[HookName]") -> tuple[str, ...]:
    """Names of the hooks that a name, a glob, or a list of them selects, each once. A tuple is one name.

    Raises:
        HookError: no stored hook matches.
    """
    listed: list[Any] = hooks if isinstance(hooks, list) else [hooks]
    return tuple(dict.fromkeys(name for one in listed for name in store.matching(one)))
