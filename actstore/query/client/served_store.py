"""A store on a server, which gives the same as one that is read directly."""

import http.client
import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
from pydantic import ValidationError

from actstore.analysis.search import Matches, check
from actstore.errors import JobError, StorageError
from actstore.facade import Store
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.families.stored_config import hooks_of_stored
from actstore.hooks.naming.names import HookName, each_name, long_name
from actstore.query.client import answers
from actstore.query.client.direct import direct_blobs
from actstore.query.client.http_blobs import HttpBlobs
from actstore.query.client.safetensors import read_tensors
from actstore.query.client.served_rows import ServedRows
from actstore.query.client.server import Server
from actstore.query.client.unix import is_unix
from actstore.query.documents import (
    MatchList,
    PromptList,
    PromptsRequest,
    Select,
    StatisticsDocument,
    StoreDocument,
)
from actstore.query.wire import SAFETENSORS
from actstore.recall.prompts import prompts_of
from actstore.recall.values import as_cached
from actstore.storage.blobs import BlobReader
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.identity import Identity, check_same
from actstore.store.reading.row_index import RowIndex
from actstore.store.reading.rows import Rows, Section
from actstore.store.records.run import Run
from actstore.store.statistics.hook_statistics import Statistics

if TYPE_CHECKING:
    import torch
    import zarr

    from actstore.loader.batches.batch_source import BatchSource
    from actstore.loader.dropping.valid_rows import ValidRows
    from actstore.loader.loader import Loader
    from actstore.loader.options import LoaderOptions

TOKEN: Final = "ACTSTORE_TOKEN"
"""Environment variable for the token, where none is given."""
_MAX_SELECTED: Final = 256 << 20
"""Bytes in one request at most; more is requested hook by hook."""
_MAX_HOOKS: Final = 1_000
_MAX_SEQUENCES: Final = 100_000
"""Sequences in one request at most."""
_MAX_NAMED: Final = 90
"""Hooks, or tokens to be dropped, in the URL of a batch at most."""
_MAX_SEARCHED: Final = 5_000
"""Characters that fit into a URL, also where each becomes several."""
_MAX_MATCHES: Final = 1_000_000
"""Matches of one search at most; as many as a server gives."""


def _prompts_request(tokens: Any, hooks: "HookName | Sequence[HookName]") -> PromptsRequest:
    """
    Raises:
        TokensError, JobError: the prompts or the hooks are none.
    """
    prompts = [prompt for batch in prompts_of(tokens) for prompt in batch]
    wanted = [long_name(name) if isinstance(name, tuple) else name for name in each_name(hooks)]
    try:
        if isinstance(prompts[0], str):
            return PromptsRequest(hooks=wanted, texts=prompts)
        return PromptsRequest(hooks=wanted, tokens=[np.asarray(ids).tolist() for ids in prompts])
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise JobError(f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None


class ServedStore(Store):
    """A `Store` whose bytes come from a server, or, where it is reachable, from the storage behind it."""

    def __init__(self, url: str, token: str | None, direct: bool | None) -> None:
        """
        Args:
            url: ``http://host:port/v1/stores/name``.
            token: token for the server; None takes that of the environment.
            direct: whether to read storage without the server: None, for loaders if it can be reached; True, for
                everything, or it is an error; False, for nothing.

        Raises:
            StorageError: there is no such store, or it cannot be read.
        """
        self._token = token
        self._direct = direct
        self.server = Server(url, token or os.environ.get(TOKEN) or None)
        if not url.rstrip("/").partition("/v1/stores/")[2]:
            raise StorageError(f"{url} names no store; write it as http://host:port/v1/stores/name")
        super().__init__(HttpBlobs(self.server), self._read_runs(), self._read_runs)

    def _read_runs(self) -> tuple[Run, ...]:
        return answers.runs_of(self.server.document(StoreDocument, ""), self.server.url)

    def _set_runs(self, runs: tuple[Run, ...]) -> None:
        super()._set_runs(runs)
        self.__dict__.pop("_behind", None)
        if self._direct:
            self.blobs, self.checksums = self._behind.blobs, self._behind.checksums
            self.kept = self._behind.kept

    @cached_property
    def _reachable(self) -> BlobReader | None:
        """The storage behind the server, if this process can read it."""
        return None if self._direct is False else direct_blobs(self.server, self.runs)

    @property
    def _must_reach(self) -> BlobReader:
        """
        Raises:
            StorageError: the storage cannot be reached.
        """
        blobs = self._reachable or direct_blobs(self.server, self.runs, must=True)
        assert blobs is not None
        return blobs

    @cached_property
    def _behind(self) -> CommittedStore:
        """The same store, read from the storage."""
        return CommittedStore(self._must_reach, self.runs, self._read_runs)

    def _rows(self, sections: list[Section]) -> Rows:
        if self._direct:
            return super()._rows(sections)
        name = sections[0].layout.path.rpartition("/")[2]
        return ServedRows(self.server, name, self.blobs, sections, self.checksums)

    def _several(self, hooks: Sequence[str], sequences: slice | Sequence[int]) -> "dict[str, torch.Tensor]":
        if self._direct or not hooks:
            return super()._several(hooks, sequences)
        index = RowIndex.parse(sequences, self.shape)
        nbytes = sum(self[name].nbytes for name in hooks) // self.shape[0] * len(index.rows)
        is_many = nbytes > _MAX_SELECTED or len(hooks) > _MAX_HOOKS or len(index.rows) > _MAX_SEQUENCES
        if is_many or len(hooks) == 1 or not len(index.rows) or index.is_reversed:
            return super()._several(hooks, sequences)
        select = Select(hooks=list(hooks), sequences=[int(row) for row in index.rows])

        expected = {name: (self[name].rows.dtype, (len(index.rows), *self[name].shape[1:])) for name in hooks}

        def take(reply: http.client.HTTPResponse) -> "dict[str, torch.Tensor]":
            return read_tensors(reply, f"{self.server.url}/select", expected)

        tensors = self.server.take("/select", take, request=select, accept=SAFETENSORS)
        return {name: tensors[name] for name in hooks}

    def stats(self, hook: HookName) -> Statistics:
        """Implements `Store.stats`; the server has merged the records."""
        array = self.array_of(hook)
        path = f"/hooks/{array.name}/stats"
        most = answers.statistics_nbytes(array.shape)
        document = self.server.document(StatisticsDocument, path, most=most)
        answers.check_statistics(document, array, f"{self.server.url}{path}")
        return Statistics(document.record, document.shape)

    def not_finite(
        self, hook: HookName, *, most_segments: int | None = None, most_records: int | None = None
    ) -> list[tuple[range, int]]:
        """Implements `Store.not_finite`; without the storage behind the server, all sequences are given together."""
        if self._reachable is not None:
            return self._behind.not_finite(hook, most_segments=most_segments, most_records=most_records)
        n_tokens = self.stats(hook).n_not_finite
        return [(range(self.shape[0]), n_tokens)] if n_tokens else []

    def _matches(
        self, text: str | None, tokens: Any, sha: str | None, prefix: bool, limit: int | None, *, once: bool
    ) -> Matches:
        check(text, tokens, sha, limit)
        listed = None if tokens is None else ",".join(map(str, np.asarray(tokens).tolist()))
        given = {"text": text, "tokens": listed, "sha": None if sha is None else sha.lower()}
        query: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if max(map(len, query.values())) > _MAX_SEARCHED:
            raise JobError(
                f"what is searched for has more than {_MAX_SEARCHED} characters; look for its first part, or open the "
                "storage itself"
            )
        most = _MAX_MATCHES if limit is None else limit
        query |= {"prefix": prefix, "once": once, "limit": most}
        # A server gives no more than that, whatever the limit.
        n_values = 2 * min(most, _MAX_MATCHES) + 2
        document = self.server.document(MatchList, "/prompts", query, most_values=n_values)
        matches = answers.matches_of(
            document, (self.shape[0], self.plan.context_length), most, f"{self.server.url}/prompts", once=once
        )
        if limit is None and len(document.sequences) == _MAX_MATCHES:
            raise JobError(
                f"there are more than {_MAX_MATCHES} places; give a limit, or look for something rarer"
            )
        return matches

    def activations(self, tokens: Any, hooks: "HookName | Sequence[HookName]") -> ActivationCache:
        """The activations of prompts. The server computes what the store lacks, and adds it to the store.

        Args:
            tokens: a text, texts, or token ids, as for `actstore.activations`.
            hooks: names, globs or pairs of hooks of the model.

        Returns:
            Values as from `actstore.activations`, without a model.

        Raises:
            JobError: the server only reads.
            HookError, TokensError, PlanMismatchError: as from `actstore.activations`.
            StorageError: the server cannot be reached, or is busy for too long.
        """
        asked = _prompts_request(tokens, hooks)
        found = self.server.document(PromptList, "/activations", request=asked, most_values=_MAX_MATCHES)
        self._set_runs(self._grown())
        n_prompts = len(asked.texts or asked.tokens or ())
        answers.check_prompts(found, n_prompts, self.shape, f"{self.server.url}/activations")
        names, cfg = hooks_of_stored(self.plan.request.model.config)
        longest = max(found.lengths)
        values = {}
        for place in found.places:
            for hook, value in self._several(place.hooks, list(place.sequences)).items():
                values[hook] = as_cached(hook, value, longest)
        return ActivationCache(values, names=names, cfg=cfg, kind="activations")

    def loader_of(self, options: "LoaderOptions", rows: "ValidRows | None" = None) -> "Loader":
        """Implements `Store.loader_of`: reads storage where it can be reached, else batches that the server makes."""
        from actstore.loader.loader import Loader

        return Loader(self, options, rows, make=self._batch_source)

    def _batch_source(self, options: "LoaderOptions", rows: "ValidRows | None") -> "BatchSource":
        from actstore.loader.batches.batch_maker import BatchMaker
        from actstore.query.client.served_batches import ServedBatches

        if self._reachable is not None:
            return BatchMaker(self._behind, options, rows)
        is_long = max(len(options.hooks), len(options.drop.tokens)) > _MAX_NAMED
        if is_long or options.drop.mask is not None or options.cache_dir is not None:
            return BatchMaker(self, options, rows)
        return ServedBatches(self, self.server, options)

    def _open_zarr(self) -> "zarr.Group":
        import zarr

        import actstore.store.format.bfloat16  # noqa: F401 - registers the type

        if is_unix(self.url):
            raise StorageError(
                f"zarr-python cannot read {self.url}, for it knows no Unix sockets; open the store over http://"
            )
        return zarr.open_group(f"{self.url}/zarr", mode="r", storage_options=self.server.storage_options)

    def newer(self) -> Self:
        """Implements `Store.newer`, with connections of its own where something is new."""
        return self if self._grown() == self.runs else self.reopened()

    def reopened(self) -> Self:
        """Implements `Store.reopened`."""
        return self._connected_again(self.url, self._token, self._direct, self.identity)

    @classmethod
    def _connected_again(cls, url: str, token: str | None, direct: bool | None, identity: Identity) -> Self:
        """Open again a store that was opened before.

        Raises:
            StoreReplacedError: the URL leads to another store now.
        """
        store = cls(url, token, direct)
        check_same(url, identity, store.identity)
        return store

    def __reduce__(self) -> tuple[Any, ...]:
        return self._connected_again, (self.url, self._token, self._direct, self.identity)
