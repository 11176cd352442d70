"""The store that users open: what is committed, and what can be done with it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import NDArray

from actstore.errors import TokensError
from actstore.hooks.naming.names import HookName, each_name
from actstore.loader.arguments import LoaderArguments, shows_options
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.activations import Activations
from actstore.store.records.run import runs_with_tokens

if TYPE_CHECKING:
    import pyarrow as pa
    import torch
    from transformers import PreTrainedTokenizerBase

    from actstore.analysis.search import Matches
    from actstore.hooks.cache.activation_cache import ActivationCache
    from actstore.hooks.capture.functions import NameFilter
    from actstore.hooks.model import HookedModel
    from actstore.loader.dropping.valid_rows import ValidRows
    from actstore.loader.loader import Loader
    from actstore.loader.options import LoaderOptions


class Store(CommittedStore):
    """Committed activations of one model over one set of tokens. Open one with `actstore.open`.

    A store that is still being written can be read: what is committed is there, and reading anything else raises.
    """

    # Imports inside of methods take seconds, and most users of a store need only some of them.

    def __getitem__(self, hook: HookName) -> Activations:
        """The activations of a hook, by any spelling of its name, such as ``("resid_post", 5)``; a glob, such as
        ``"blocks.*.hook_resid_post"``, gives a dict of those of several, as `select` does.

        ``blocks.5.hook_resid_pre`` is served from ``blocks.4.hook_resid_post``, the same tensor.

        Raises:
            HookError: this store does not hold the hook, or any that the glob matches.
        """
        if isinstance(hook, str) and "*" in hook:
            return self.select(hook)  # type: ignore[return-value] # types are right for one hook, and `select` has its own
        return super().__getitem__(hook)

    def select(self, *patterns: HookName) -> dict[str, Activations]:
        """The activations of several hooks by their stored names, in model order.

        Args:
            patterns: names, in any spelling, and globs, such as ``"blocks.*.hook_resid_post"``.

        Raises:
            HookError: this store holds nothing of one of them.
        """
        chosen = {name for pattern in patterns for name in self.matching(pattern)}
        return {name: super(Store, self).__getitem__(name) for name in self.hooks if name in chosen}

    def keys(self) -> tuple[str, ...]:
        """The names of the stored hooks, in model order: ``dict(store)`` has the activations of all."""
        return self.hooks

    def __len__(self) -> int:
        """Number of stored hooks; `shape` has the number of sequences."""
        return len(self.hooks)

    def _repr_html_(self) -> str:
        """What the store holds, for notebooks."""
        from actstore.store.showing.pages import page_of_store

        return page_of_store(
            self.url,
            self.plan,
            [self.array_of(name) for name in self.hooks],
            shape=self.shape,
            nbytes=self.nbytes,
            n_tokens=self.n_tokens,
            state=self._state,
        )

    def cache(
        self,
        sequences: int | slice | Sequence[int],
        *,
        names_filter: "NameFilter | None" = None,
        model: "HookedModel | None" = None,
    ) -> "ActivationCache":
        """The stored values of some sequences, as `HookedModel.run_with_cache` gives them for the same tokens.

        Where only chosen positions are stored, values have slots in the place of positions, also in what methods of
        the cache compute, and for their ``pos_slice``. ``cache.positions`` says which position each slot holds.

        Args:
            sequences: rows of the store.
            names_filter: hooks to read: names, globs, or a function of the name; None for all that are stored.
            model: model for methods of the cache that need weights.

        Raises:
            HookError: a hook is not stored.
            NotCommittedError: a row is not committed.
        """
        import torch

        from actstore.hooks.cache.activation_cache import ActivationCache
        from actstore.hooks.naming.hook_points import point_of

        names, cfg = self._model_hooks
        rows = [sequences] if isinstance(sequences, int) else sequences
        wanted = self.hooks
        if callable(names_filter):
            wanted = tuple(name for name in self.hooks if names_filter(name))
        elif names_filter is not None:
            patterns = each_name(names_filter)
            chosen = {name for pattern in patterns for name in self.matching(pattern)}
            wanted = tuple(name for name in self.hooks if name in chosen)
        values = {}
        for name, value in self._several(wanted, rows).items():
            point = point_of(name)
            axis = 1 if point is None else point.position_axis
            values[name] = value.movedim(1, axis)
        positions = (
            None if self.positions is None else torch.from_numpy(self.positions[rows].astype(np.int64))
        )
        return ActivationCache(values, model, names=names, cfg=cfg, kind="activations", positions=positions)

    def _several(self, hooks: Sequence[str], sequences: slice | Sequence[int]) -> "dict[str, torch.Tensor]":
        return {name: self[name][sequences] for name in hooks}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns of the source that the store keeps, such as labels (`keep` of a job)."""
        return self.kept.names

    @property
    def rows(self) -> "pa.Table":
        """The kept columns: an Arrow table with one row for each document of the source, empty documents included.

        Where a store has one part, row `d` is that of document `d` of `documents`. `document_rows` gives the row in
        every case. The columns are read at the first use, and kept in memory.

        Raises:
            NotCommittedError: the tokens of a part are not committed.
            StorageError: a table is damaged or cannot be read.
            TokensError: the store keeps no columns.
        """
        import pyarrow as pa

        return pa.table(self.kept.columns())

    def column(self, name: str) -> "pa.ChunkedArray[Any]":
        """One of the kept columns, by document, as in `rows`; the others are not unpacked.

        Raises:
            NotCommittedError, StorageError, TokensError: as for `rows`.
        """
        return self.kept.columns([name])[name]

    def document_rows(self, sequences: slice | Sequence[int] = slice(None)) -> NDArray[np.int64]:
        """The row of `rows` that each token belongs to, int64 [n_sequences, context_length]; -1 for tokens that packing
        put in, for padding, and for parts of the store that keep no columns.

        Args:
            sequences: rows of the store.

        Raises:
            NotCommittedError, StorageError: as for `rows`.
        """
        numbers = np.arange(self.shape[0])[sequences]
        return self.kept.rows_of(self.documents[sequences], numbers)

    def per_sequence(
        self, name: str, sequences: slice | Sequence[int] = slice(None)
    ) -> "pa.ChunkedArray[Any]":
        """A kept column with one value for each sequence, that of its document: labels for probes.

        ``store.per_sequence("label").to_numpy()`` is in the order of ``store[hook][:]``.

        Args:
            name: column.
            sequences: rows of the store.

        Raises:
            NotCommittedError, StorageError: as for `rows`.
            TokensError: the store does not keep the column, or has sequences of several documents (packing concat).
        """
        column = self.column(name)
        joined = [
            part.plan.run
            for part in runs_with_tokens(self.runs)
            if part.plan.request.tokens.packing == "concat"
        ]
        if joined:
            raise TokensError(
                f"run {joined[0]} of {self.url} has sequences of several documents (packing concat), so {name} has no "
                "one value for each; use column and document_rows, or extract with packing: document"
            )
        numbers = np.arange(self.shape[0])[sequences]
        # Packing puts one token in front of a document; whole sequences are read only where that does not suffice.
        documents = self.documents[sequences, :2].max(axis=1, initial=-1)
        (others,) = np.nonzero(documents < 0)
        if len(others):
            documents[others] = self.documents[numbers[others]].max(axis=1)
        rows = self.kept.rows_of(documents, numbers)
        taken: pa.ChunkedArray[Any] = column.take(_or_null(rows))
        return taken

    def find(
        self,
        text: str | None = None,
        *,
        tokens: "Sequence[int] | NDArray[np.integer[Any]] | None" = None,
        sha: str | None = None,
        prefix: bool = False,
        limit: int | None = None,
    ) -> NDArray[np.int64]:
        """Numbers of the sequences that hold a text or token ids, ascending, each once: ``store[hook][rows]``.

        All token ids are read, block by block; padding never matches. Rows match as soon as their tokens are stored;
        their activations may not be committed yet, see `committed_rows`.

        Args:
            text: text to search for. The tokenizer of the store makes it into tokens as it is and behind a space, which
                gives other ids; either may match. Inside of a longer text, its ends can be merged into other tokens,
                and then it does not match there; ``tokens`` is exact.
            tokens: ids that follow each other.
            sha: hash of all real tokens of a sequence, from `actstore.analysis.search.sequence_sha256`.
            prefix: whether to match only where a sequence begins: at position 0, or at 1 behind a token that packing
                put in.
            limit: the most sequences; the search ends when it has them.

        Returns:
            Numbers of sequences, int64 [n_matches].

        Raises:
            JobError: not exactly one of text, tokens and sha is given, or it is not valid; or the limit is below 1.
            NotCommittedError: the tokens of a run are not complete.
            StorageError: the tokens cannot be read.
            TokensError: the text gives no tokens, or the tokenizer is unknown or missing, or is not the same any more.
        """
        return self._matches(text, tokens, sha, prefix, limit, once=True).sequences

    def locate(
        self,
        text: str | None = None,
        *,
        tokens: "Sequence[int] | NDArray[np.integer[Any]] | None" = None,
        sha: str | None = None,
        prefix: bool = False,
        limit: int | None = None,
    ) -> "Matches":
        """Every place where a text or token ids begin: like `find`, but with positions, and the limit counts places.

        Returns:
            ``sequences`` [n_matches] and ``positions`` [n_matches], in the order of the store, each place once.
        """
        return self._matches(text, tokens, sha, prefix, limit, once=False)

    def _matches(
        self, text: str | None, tokens: Any, sha: str | None, prefix: bool, limit: int | None, *, once: bool
    ) -> "Matches":
        from actstore.analysis.search import search

        return search(self, text, tokens, sha, prefix, limit, once)

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer that made the tokens, compared with the hash that the store has of it.

        Raises:
            TokensError: it is unknown or missing, or is not the same any more.
        """
        from actstore.analysis.text import tokenizer_of

        return tokenizer_of(self)

    def text(self, sequence: int, position: int | None = None, *, window: int = 20) -> str:
        """The text of a sequence without its padding, or around one of its positions.

        Args:
            sequence: number of the sequence; negative ones count from the end.
            position: position in it; negative ones count from its last real token. None gives all of it.
            window: number of tokens on each side of the position.

        Raises:
            IndexError: there is no such sequence or position.
            NotCommittedError: the tokens of a run are not complete.
            TokensError: the tokenizer is unknown or missing, or is not the same any more.
        """
        from actstore.analysis.text import text_of

        return text_of(self, sequence, position, window)

    def str_tokens(self, sequence: int) -> list[str]:
        """The text of each token of a sequence without its padding, as TransformerLens' ``to_str_tokens`` gives it.

        Raises:
            IndexError, NotCommittedError, TokensError: as `text` does.
        """
        from actstore.analysis.text import str_tokens_of

        return str_tokens_of(self, sequence)

    @shows_options
    def loader(self, hooks: "HookName | Sequence[HookName]", **options: Unpack[LoaderArguments]) -> "Loader":
        """Batches of rows in random order: an iterator for training.

        Which rows are in batch k depends on the seed, the epoch and k alone, so a loader is resumed from two integers
        (``state_dict``), and ranks take disjoint parts of the same batches.

        Args:
            hooks: a name, for batches that are tensors; several, or a glob, for dicts with the rows aligned, one entry
                for each stored tensor, under the name in `hooks`, whichever of its names were given.
            options: see `LoaderArguments`.

        Raises:
            HookError: a hook is not stored.
            LoaderError: an option is not valid, or no rows are left.
            NotCommittedError: a row is not committed.
            StorageError: something that the loader needs cannot be read.
        """
        from actstore.loader.options import options_of

        return self.loader_of(options_of(self, hooks, **options))

    def loader_of(self, options: "LoaderOptions", rows: "ValidRows | None" = None) -> "Loader":
        """A loader with options that were made for this store, see `loader`.

        Args:
            options: options for this store.
            rows: rows that are not dropped, if they are known.
        """
        from actstore.loader.loader import Loader

        return Loader(self, options, rows)


def _or_null(rows: NDArray[np.int64]) -> Any:
    """Numbers of rows as Arrow takes them, with null in the place of -1."""
    import pyarrow as pa

    return pa.array(rows, mask=rows < 0)
