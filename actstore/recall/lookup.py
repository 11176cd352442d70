"""What a store has of the activations of some prompts, and what would have to be computed for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actstore.recall.known_sequences import digest, places_of, sequences_of
from actstore.recall.prompts import Ids
from actstore.store.committed_store import CommittedStore
from actstore.store.format.plan import TokensIdentity
from actstore.store.records.run import Run, runs_with_tokens
from actstore.tokens import open_memory
from actstore.tokens.memory.opening import PREFIX


@dataclass(frozen=True)
class Work:
    """Sequences, and the hooks that are computed of all of them in one run."""

    sequences: list[Ids]
    hooks: tuple[str, ...]


class Lookup:
    """Where a store has the hooks of some sequences."""

    def __init__(self, store: CommittedStore, sequences: Sequence[Ids], hooks: Sequence[str]) -> None:
        """
        Args:
            store: the store as it is now.
            sequences: different sequences.
            hooks: names as they are stored.

        Raises:
            StorageError: its tokens cannot be read.
        """
        self._store = store
        self._sequences = sequences
        self._parts = _parts(store)
        self._runs_over: dict[str, list[Run]] = {}
        for run in store.runs:
            self._runs_over.setdefault(run.plan.tokens_of, []).append(run)
        self._places = places_of(store, [digest(ids) for ids in sequences])
        self._first = np.array([places[0] if places else -1 for places in self._places], np.int64)
        self.rows = {hook: self._rows(hook) for hook in hooks}
        """The row of each sequence, by hook, [n_sequences]; -1 where the hook is not committed."""

    def _rows(self, hook: str) -> NDArray[np.int64]:
        committed = self._committed(hook)
        is_there = (self._first >= 0) & committed[self._first]
        rows = np.where(is_there, self._first, -1)
        for number in np.flatnonzero(~is_there):
            rows[number] = next((row for row in self._places[number] if committed[row]), -1)
        return rows

    def _committed(self, hook: str) -> NDArray[np.bool_]:
        """Whether each row has the hook, [n_sequences of the store + 1]; the last one, row -1, has not."""
        committed = np.zeros(self._store.shape[0] + 1, bool)
        for part, rows in self._parts:
            for run in self._runs_over[part.plan.run]:
                if run.hook(hook) is not None:
                    committed[rows.start : rows.stop] = run.committed_rows()
        return committed

    @property
    def work(self) -> list[Work]:
        """What is to be computed next; nothing, if all is there.

        A run that was begun and not completed is completed, if a sequence waits for it: its writer may have been
        killed. Hooks are added over a part of the store whose sequences are all asked for. Everything else is appended,
        so that nothing is computed that nobody has asked for.
        """
        interrupted: dict[str, Work] = {}
        added: dict[str, tuple[range, list[str]]] = {}
        appended: dict[tuple[str, ...], list[Ids]] = {}
        asked_for = self._parts_asked_for()
        for number, places in enumerate(self._places):
            missing = tuple(hook for hook, rows in self.rows.items() if rows[number] < 0)
            if not missing:
                continue
            holding = [(part, rows) for part, rows in self._parts if any(row in rows for row in places)]
            own = [place for place in holding if _is_own(place[0])]
            unfinished = self._unfinished(own)
            if unfinished is not None:
                run, rows = unfinished
                if run.plan.run not in interrupted:
                    interrupted[run.plan.run] = Work(self._all_of(rows), run.plan.hook_names)
                continue
            over = next((place for place in own if place[0].plan.run in asked_for), None)
            if over is None:
                appended.setdefault(missing, []).append(self._sequences[number])
                continue
            part, rows = over
            _, hooks = added.setdefault(part.plan.run, (rows, []))
            hooks += [hook for hook in missing if hook not in hooks]
        return [
            *interrupted.values(),
            *(Work(self._all_of(rows), tuple(hooks)) for rows, hooks in added.values()),
            *(Work(sequences, self._hooks_first(sequences, hooks)) for hooks, sequences in appended.items()),
        ]

    def _hooks_first(self, sequences: list[Ids], missing: tuple[str, ...]) -> tuple[str, ...]:
        """The hooks to compute next of sequences that are to be appended: the missing ones. If a run over the very same
        sequences was begun, and has not even stored its tokens, those of that run, as no hook can be added before.
        """
        source = open_memory(sequences).url
        for part, _ in self._parts:
            if not part.has_tokens and part.plan.request.tokens.source == source and _is_own(part):
                return part.plan.hook_names
        return missing

    def _unfinished(self, parts: Sequence[tuple[Run, range]]) -> tuple[Run, range] | None:
        for part, rows in parts:
            for run in self._runs_over[part.plan.run]:
                if not run.is_complete:
                    return run, rows
        return None

    def _parts_asked_for(self) -> set[str]:
        """Names of the parts all of whose sequences are asked for."""
        asked = np.zeros(self._store.shape[0], bool)
        asked[[row for places in self._places for row in places]] = True
        return {part.plan.run for part, rows in self._parts if asked[rows.start : rows.stop].all()}

    def _all_of(self, rows: range) -> list[Ids]:
        return list(sequences_of(self._store, rows))


def _parts(store: CommittedStore) -> list[tuple[Run, range]]:
    """The parts of a store, with their rows."""
    parts, first = [], 0
    for part in runs_with_tokens(store.runs):
        parts.append((part, range(first, first + part.plan.n_sequences)))
        first += part.plan.n_sequences
    return parts


def _is_own(part: Run) -> bool:
    """Whether a part was made from token ids in memory just as they are, so that its sequences give it again."""
    tokens, request = part.plan.request.tokens, part.plan.request
    wanted = TokensIdentity(
        source=tokens.source,
        files=tokens.files,
        column=None,
        documents=tokens.documents,
        tokenizer=None,
        tokenizer_sha256=None,
        packing="document",
        context_length=tokens.context_length,
        begin_batch_token=None,
        begin_sequence_token=None,
        separator_token=None,
        pad_token=0,
        max_tokens=None,
        skip_sequences=0,
        seed=None,
    )
    return (
        tokens.source.startswith(PREFIX)
        and tokens == wanted
        and request.compression is None
        and not request.covariance
    )
