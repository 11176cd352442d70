"""The first stage of planning: tokenising and packing all text, so that the plan knows its size."""

import os
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from actstore.errors import JobError, PlanMismatchError, TokensError
from actstore.extraction.events import OnEvent, Tokenised
from actstore.extraction.planning.given import Given
from actstore.extraction.planning.job import Job, check_packing
from actstore.extraction.planning.tokenising.chat_settings import (
    identity_of,
    refuse_chat_settings,
    template_of,
)
from actstore.extraction.planning.tokenising.chosen_slots import ChosenSlots, check_chosen
from actstore.extraction.planning.tokenising.kept_tables import check_types
from actstore.extraction.planning.tokenising.packed_tokens import PackedTokens
from actstore.extraction.planning.tokenising.source_files import identities
from actstore.extraction.planning.tokenising.special_tokens import needs_tokenizer, special_tokens
from actstore.store.format.plan import Plan, TokensIdentity
from actstore.tokens import (
    KeptRows,
    Packing,
    Rows,
    RowStream,
    Source,
    chats_of,
    load_tokenizer,
    open_source,
    opening_token,
    order,
    pack,
    spool,
    token_documents,
    tokenizer_sha256,
)
from actstore.tokens.batch import TokenIds
from actstore.tokens.chats.labelled_rows import TokenLabels, chat_documents
from actstore.tokens.chats.listed_roles import COLUMNS, ListedRoles
from actstore.tokens.chats.renderer import Renderer
from actstore.tokens.chats.template import ChatTemplate
from actstore.tokens.chats.token_roles import chat_tokens
from actstore.tokens.keeping.row_taker import RowTaker
from actstore.tokens.selection.listed_positions import ListedPositions
from actstore.tokens.selection.positions import After, Column, Selection, parse_positions
from actstore.tokens.selection.text_places import TextPlaces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenStage:
    """A source of text or ids that was opened and checked, but not read yet."""

    source: Source
    tokenizer: "PreTrainedTokenizerBase | None"
    packing: Packing
    identity: TokensIdentity
    n_embeddings: int
    """Number of ids that the model has embeddings for; ids of the text must be below it."""
    selection: Selection | None = None
    """What chooses the positions whose activations are stored; None for all."""
    template: ChatTemplate | None = None
    """The template of chats; None if documents are no chats."""

    @classmethod
    def of(
        cls, job: Job, n_embeddings: int, given: Given, *, context_length: int, bos: int | None = None
    ) -> "TokenStage":
        """Open the source and the tokenizer of a job.

        Args:
            job: the job.
            n_embeddings: number of ids that the model has embeddings for.
            given: tokens and tokenizer in memory, if any.
            context_length: tokens in a row.
            bos: the BOS token of the model, for a source that needs no tokenizer.

        Raises:
            JobError: the positions are none that can be chosen.
            JobError, StorageError: the chat template cannot be read, or is for no chats.
            TokensError: one of them cannot be opened, or the tokenizer or the model lacks a token that packing needs.
        """
        selection = parse_positions(job.positions)
        beside = dict.fromkeys(
            (
                *job.kept_columns,
                *([selection.name] if isinstance(selection, Column) else []),
                *(COLUMNS if job.token_roles else ()),
            )
        )
        source: Source
        if given.tokens is not None:
            in_memory = given.tokens.keeping(tuple(beside))
            source, job = in_memory, job.model_copy(update={"tokens": in_memory.url})
        else:
            source = open_source(
                job.tokens, column=job.column, documents=job.documents, keep=tuple(beside), chat=job.chat
            )
        is_text, is_chat, is_file = source.kind == "text", source.kind == "chats", given.tokens is None
        job = job.model_copy(update={"packing": job.packing or ("document" if is_chat else "concat")})
        assert job.packing is not None
        check_packing(job)
        if isinstance(selection, Column) and job.packing != "document":
            raise JobError(
                f"positions {selection} are for packing: document, where a sequence is one document; choose that, or "
                "other positions"
            )
        if job.token_roles and source.kind != "tokens":
            raise JobError(
                f"token_roles is for token ids, and {job.tokens} holds {source.kind}: name a column of ids (--column), "
                "or leave it out"
            )
        is_needed = is_chat or needs_tokenizer(job, is_text=is_text, is_file=is_file)
        tokenizer = _load_tokenizer(job, given) if is_needed else given.tokenizer
        template = None
        if is_chat:
            assert tokenizer is not None
            template = template_of(job, tokenizer, add_generation_prompt=job.add_generation_prompt)
        else:
            refuse_chat_settings(job, job.tokens)
        default: Literal["bos", "none"] = "bos" if is_text else "none"
        if not is_file and not (given.prepends_bos and getattr(tokenizer, "bos_token_id", None) is not None):
            default = "none"
        special = special_tokens(job, tokenizer, default=default, n_embeddings=n_embeddings, is_file=is_file)
        packing = Packing(
            mode=job.packing,
            context_length=context_length,
            begin_batch=special.begin_batch,
            begin_sequence=special.begin_sequence,
            separator=special.separator,
            pad=special.pad,
            truncate=job.truncate,
            kept=bos if tokenizer is None else tokenizer.bos_token_id,
            keeps_empty=not is_file,
            always_begins=not is_file and is_text,
        )
        identity = TokensIdentity(
            source=job.tokens,
            files=identities(source.files),
            column=source.column,
            documents=job.documents,
            tokenizer=None if tokenizer is None else job.tokenizer or job.model,
            tokenizer_sha256=None if tokenizer is None else tokenizer_sha256(tokenizer),
            packing=job.packing,
            context_length=context_length,
            begin_batch_token=packing.begin_batch,
            begin_sequence_token=packing.begin_sequence,
            separator_token=packing.separator,
            pad_token=packing.pad,
            max_tokens=job.max_tokens,
            skip_sequences=0,
            seed=job.seed,
            chat=None if template is None else identity_of(template),
            keep=job.kept_columns,
            truncate=job.truncate,
            positions=None if selection is None else str(selection),
            token_roles=job.token_roles,
        )
        return cls(source, tokenizer, packing, identity, n_embeddings, selection, template)

    def fitted(self, model: str, at_least: int) -> "TokenStage":
        """The same with rows as long as the longest document, or ``at_least``, and at most as long as they are now.

        All documents are read and tokenised for it.

        Args:
            model: name of the model, whose positions are the longest row.
            at_least: least tokens of a row.

        Raises:
            TokensError: the source cannot be read, or documents are longer that may not be cut.
        """
        limit = self.packing.context_length
        n_documents = n_too_long = longest = 0
        for number, ids in self._documents():
            if len(ids) or self.packing.keeps_empty:
                size = len(ids) + (opening_token(number, ids, self.packing) is not None)
                n_documents, n_too_long = n_documents + 1, n_too_long + (size > limit)
                longest = max(longest, size)
        if n_too_long and self.packing.truncate is None:
            raise TokensError(
                f"{n_too_long:,} of {n_documents:,} documents are longer than the {limit:,} positions of {model}, and "
                f"the longest needs {longest:,}; choose truncate: left or right (--truncate) to cut them at that end, "
                "or split them"
            )
        # The token that a row begins with leaves room for one more, even if all documents are empty.
        return self.of_length(min(max(longest, at_least, 2), limit))

    def _documents(self) -> Iterator[tuple[int, TokenIds]]:
        """The token ids of all documents, with their numbers."""
        if self.template is None:
            yield from token_documents(self.source, self.tokenizer)
            return
        assert self.tokenizer is not None
        with Renderer(self.template) as render:
            for first, chats in chats_of(self.source):
                tokens = chat_tokens(chats, first, self.tokenizer, render)
                yield from ((number, chat.ids) for number, chat in enumerate(tokens, first))

    def of_length(self, context_length: int) -> "TokenStage":
        """The same with rows of another length."""
        return replace(
            self,
            packing=replace(self.packing, context_length=context_length),
            identity=self.identity.model_copy(update={"context_length": context_length}),
        )

    def run(
        self,
        on_event: OnEvent,
        *,
        skip_sequences: int = 0,
        skipped: Sequence[Plan] = (),
        n_slots: int | None = None,
    ) -> "PackedTokens":
        """Read, tokenise and pack the source into a temporary folder, without its first sequences.

        Args:
            on_event: called with each event of progress.
            skip_sequences: number of first sequences to leave out.
            skipped: plans of the runs that must hold exactly these sequences, if they are known.
            n_slots: slots of a sequence in the store; None for as many as are needed.

        Raises:
            TokensError: the text is empty or cannot be read, or has ids that the model does not have; or not one
                position is chosen.
            PlanMismatchError: the skipped runs hold other sequences, or more slots are needed than the store has.
        """
        started = time.perf_counter()
        length = self.packing.context_length
        max_rows = None if self.identity.max_tokens is None else self.identity.max_tokens // length
        if max_rows == 0:
            raise TokensError(
                f"max_tokens is {self.identity.max_tokens}, which is less than one sequence of {length} tokens"
            )
        source = self.source
        if isinstance(self.selection, After):
            source = TextPlaces(source, self.tokenizer, self.selection.text)
        folder = Path(tempfile.mkdtemp(prefix="actstore-tokens-"))
        used = _Used()
        kept = KeptRows(self.identity.keep, folder) if self.identity.keep else None
        listed = (
            None if not isinstance(self.selection, Column) else ListedPositions(self.selection.name, kept)
        )
        choosing = None
        if self.selection is not None:
            places = source if isinstance(source, TextPlaces) else None
            choosing = ChosenSlots(self.selection, places, listed, self.identity.seed)

        def blocks() -> Iterator[Rows]:
            n_sequences = n_tokens = n_truncated = 0
            for block in self._packed(source, used, kept if listed is None else listed, max_rows):
                n_sequences += len(block)
                n_tokens += int(block.lengths.sum(dtype=np.int64))
                n_truncated += int(np.count_nonzero(block.cut))
                on_event(Tokenised(n_sequences, n_tokens, n_truncated))
                yield block
            if skip_sequences >= n_sequences:
                raise TokensError(
                    f"the store holds {skip_sequences} sequences of this text, and it has {n_sequences} up to "
                    "max_tokens; there is nothing to add"
                )

        try:
            rows = RowStream(blocks())
            for plan in skipped:
                _check_skipped(rows, plan, folder)
            if not skipped:
                deque(rows.take(skip_sequences), maxlen=0)
            spooled = spool(
                rows.rest(),
                folder,
                has_roles=self.identity.has_roles,
                choose=choosing,
                n_slots=n_slots or 1,
            )
            check_chosen(spooled, self.selection, n_slots)
            if kept is not None:
                kept.finish(used.n_documents)
                check_types(kept.schema)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        permutation = order(spooled.n_sequences, self.identity.seed)
        packed = PackedTokens(spooled, permutation, time.perf_counter() - started, kept)
        if os.name == "posix":
            # Mapped files live on after they are unlinked, and end with the process even when it is killed.
            shutil.rmtree(folder, ignore_errors=True)
        weakref.finalize(packed, shutil.rmtree, folder, ignore_errors=True)
        return packed

    def _packed(
        self, source: Source, used: "_Used", kept: RowTaker | None, max_rows: int | None
    ) -> Iterator[Rows]:
        def packed(documents: Iterable[tuple[int, TokenIds]]) -> Iterator[Rows]:
            return pack(used.count(documents), self.packing, max_rows=max_rows, vocab_size=self.n_embeddings)

        labels = TokenLabels()
        if self.template is not None:
            assert self.tokenizer is not None
            with Renderer(self.template) as render:
                chats = chat_documents(chats_of(source, kept), self.tokenizer, render, labels)
                yield from labels.labelled(packed(chats))
        elif self.identity.token_roles:
            roles = ListedRoles(labels, kept)
            documents = roles.documents(token_documents(source, self.tokenizer, roles))
            yield from labels.labelled(packed(documents))
        else:
            yield from packed(token_documents(source, self.tokenizer, kept))


class _Used:
    """Counts the documents up to the last one that packing took."""

    n_documents = 0

    def count(self, documents: Iterable[tuple[int, TokenIds]]) -> Iterator[tuple[int, TokenIds]]:
        for number, ids in documents:
            self.n_documents = number + 1
            yield number, ids


def _check_skipped(rows: RowStream, plan: Plan, folder: Path) -> None:
    """Check that the next rows are those of a run.

    Raises:
        PlanMismatchError: they are others, so the text has changed.
        TokensError: there are fewer.
    """
    spooled = spool(rows.take(plan.n_sequences), folder / plan.run)
    if spooled.n_sequences < plan.n_sequences:
        raise TokensError(
            f"run {plan.run} of the store has {plan.n_sequences} sequences of this text, and it has "
            f"{spooled.n_sequences} up to max_tokens; there is nothing to add"
        )
    packed = PackedTokens(spooled, order(spooled.n_sequences, plan.request.tokens.seed), 0.0)
    if packed.sha256() != plan.tokens_sha256:
        raise PlanMismatchError(
            f"run {plan.run} of the store has other tokens than {plan.request.tokens.source} gives now; the text has "
            "changed, and cannot be gone on with: name only new files, or choose another out"
        )


def _load_tokenizer(job: Job, given: Given) -> "PreTrainedTokenizerBase":
    if given.tokenizer is not None:
        found: PreTrainedTokenizerBase = given.tokenizer
        return found
    if given.model is not None and job.tokenizer is None:
        raise TokensError(
            "the model in memory has no tokenizer, and this job needs one; give tokenizer=, or token ids and an id as "
            "pad_token"
        )
    # The revision is the model's, and means nothing in another repository.
    return load_tokenizer(job.model, job.revision) if job.tokenizer is None else load_tokenizer(job.tokenizer)
