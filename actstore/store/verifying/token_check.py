"""Checking the token arrays of a run: they must hold each packed row once, as planned."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore.store.format.layout import ArrayLayout
from actstore.store.format.plan import Plan
from actstore.store.format.sizes import Sizes
from actstore.store.records.commit import ObjectRecord, TokensRecord, columns_key, tokens_key
from actstore.store.verifying.inspection import Inspection
from actstore.store.verifying.table_check import check_tables
from actstore.tokens.chats.chat import NO_TURN, PADDING, ROLES, TEMPLATE


@dataclass(frozen=True)
class CheckedTokens:
    """The result of checking the tokens of a run."""

    record: TokensRecord
    sizes: Sizes | None
    """How much of each sequence there is; None if the lengths or the chosen positions are damaged."""
    is_sound: bool
    """Whether the record names the shards of the planned tokens."""


def check_tokens(inspection: Inspection, plan: Plan) -> CheckedTokens | None:
    """Check the tokens record of a run, and every shard and table of kept columns that it names.

    Args:
        inspection: collects the findings.
        plan: the plan of a run that brings tokens and has a tokens record.

    Returns:
        None if the record cannot be trusted.
    """
    key = tokens_key(plan.run)
    record = inspection.document(TokensRecord, key, run=plan.run)
    if record is None:
        return None
    layouts = plan.token_arrays()
    # Counted first: a damaged plan can announce more shards than a list can hold.
    if len(record.shards) != sum(layout.n_shards for layout in layouts) or any(
        shard.key != layout.key(index)
        for shard, (layout, index) in zip(
            record.shards, ((layout, i) for layout in layouts for i in range(layout.n_shards)), strict=True
        )
    ):
        inspection.report(key, "does not name the shards of the token arrays", run=plan.run)
        return None
    tables = tuple(columns_key(plan.run, number) for number in range(len(record.tables)))
    if tuple(table.key for table in record.tables) != tables or bool(tables) != bool(
        plan.request.tokens.keep
    ):
        inspection.report(key, "does not name the tables of the kept columns", run=plan.run)
        return None
    records = {shard.key: shard for shard in record.shards}
    last_document = -1
    ids = hashlib.sha256()
    lengths: dict[int, NDArray[Any]] = {}
    counts: list[NDArray[Any]] = []
    n_damaged = dict.fromkeys((layout.path for layout in layouts), 0)
    of_ids, of_lengths, of_documents = map(plan.token_array, ("tokens", "lengths", "documents"))
    of_positions = None if plan.n_slots is None else plan.token_array("positions")
    of_chats = chat_layouts(plan)
    for layout in layouts:
        for index in range(layout.n_shards if layout not in of_chats else 0):
            rows = inspection.shard(layout, index, records[layout.key(index)], run=plan.run)
            if rows is None:
                n_damaged[layout.path] += 1
            elif layout == of_ids:
                ids.update(np.ascontiguousarray(rows).data)
            elif layout == of_lengths:
                lengths[index] = rows
            elif layout == of_positions:
                counts.append((rows >= 0).sum(axis=1))
                problem = position_problem(rows, lengths.get(index))
                if problem is not None:
                    inspection.report(layout.key(index), problem, run=plan.run)
                    n_damaged[layout.path] += 1
            elif layout == of_documents:
                last_document = max(last_document, int(rows.max()))
    is_other = not n_damaged[of_ids.path] and ids.hexdigest() != plan.tokens_sha256
    if is_other:
        # One hash over all rows cannot tell which of them are wrong.
        for index in range(of_ids.n_shards):
            problem = "is part of other tokens than those of the plan: not each packed row once, in order"
            inspection.report(of_ids.key(index), problem, run=plan.run)
    check_tables(inspection, plan, record, last_document)
    checked = None
    if not n_damaged[of_lengths.path]:
        checked = _checked_lengths(inspection, plan, np.concatenate(list(lengths.values())))
    if of_chats:
        _check_chats(inspection, plan, records, checked)
    of_rows = checked
    if of_positions is not None:
        of_rows = None
        if not n_damaged[of_positions.path]:
            of_rows = _checked_counts(inspection, plan, np.concatenate(counts))
    sizes = None if checked is None or of_rows is None else Sizes(checked, of_rows)
    return CheckedTokens(record, sizes, is_sound=sizes is not None and not is_other)


def position_problem(positions: NDArray[Any], lengths: NDArray[Any] | None) -> str | None:
    """Return how chosen positions, [n, slots], cannot be, or None if they can.

    Args:
        positions: chosen positions.
        lengths: real tokens of each sequence, [n]; None if they are damaged.
    """
    is_used = positions >= 0
    if positions.min() < -1 or (is_used[:, 1:] & ~is_used[:, :-1]).any():
        return "holds slots in use behind slots that are not"
    if (is_used[:, 1:] & (positions[:, 1:] <= positions[:, :-1])).any():
        return "holds positions that do not ascend"
    if lengths is not None and (positions >= lengths[:, None]).any():
        return "holds positions behind the last token of their sequence"
    return None


def chat_layouts(plan: Plan) -> tuple[ArrayLayout, ...]:
    """The arrays of roles and turns; none if tokens have no roles."""
    if not plan.request.tokens.has_roles:
        return ()
    return plan.token_array("roles"), plan.token_array("turns")


def _check_chats(
    inspection: Inspection, plan: Plan, records: Mapping[str, ObjectRecord], lengths: NDArray[Any] | None
) -> None:
    """Check every shard of roles and turns, and that what they say goes together."""
    of_roles, of_turns = chat_layouts(plan)
    for index in range(of_roles.n_shards):
        roles, turns = (
            inspection.shard(layout, index, records[layout.key(index)], run=plan.run)
            for layout in (of_roles, of_turns)
        )
        if roles is None or turns is None or lengths is None:
            continue
        start = index * of_roles.shard_rows
        problem = role_problem(roles, turns, lengths[start : start + len(roles)])
        if problem is not None:
            inspection.report(of_roles.key(index), problem, run=plan.run)


def role_problem(roles: NDArray[Any], turns: NDArray[Any], lengths: NDArray[Any]) -> str | None:
    """Return how roles and turns, [n, context_length], contradict each other or the lengths, [n], or None."""
    if roles.min() < PADDING or roles.max() > max(ROLES.values()):
        return f"holds roles that are not between {PADDING} and {max(ROLES.values())}"
    is_padding = np.arange(roles.shape[1]) >= lengths[:, None]
    if ((roles == PADDING) != is_padding).any():
        return "has the role of padding elsewhere than behind the end of a sequence"
    if ((turns >= 0) != (roles > TEMPLATE)).any() or turns.min() < NO_TURN:
        return "has tokens with the role of a message and no message, or the reverse"
    # Within a message, the role does not change; another document has messages of its own.
    is_same = (turns[:, 1:] == turns[:, :-1]) & (turns[:, 1:] >= 0)
    if (is_same & (roles[:, 1:] != roles[:, :-1])).any():
        return "gives neighbouring tokens of one message different roles"
    return None


def length_problem(plan: Plan, lengths: NDArray[Any]) -> str | None:
    """Return how the lengths of all rows, [n_sequences], contradict the plan, or None if they do not."""
    if lengths.min() < 1 or lengths.max() > plan.context_length:
        return f"holds lengths that are not between 1 and {plan.context_length}"
    n_tokens = int(lengths.sum(dtype=np.int64))
    if n_tokens != plan.n_tokens:
        return f"is part of {n_tokens} tokens where {plan.n_tokens} were planned"
    return None


def _checked_lengths(inspection: Inspection, plan: Plan, lengths: NDArray[Any]) -> NDArray[Any] | None:
    problem = length_problem(plan, lengths)
    if problem is None:
        return lengths
    layout = plan.token_array("lengths")
    for index in range(layout.n_shards):
        inspection.report(layout.key(index), problem, run=plan.run)
    return None


def _checked_counts(inspection: Inspection, plan: Plan, counts: NDArray[Any]) -> NDArray[Any] | None:
    n_rows = int(counts.sum(dtype=np.int64))
    if n_rows == plan.n_rows:
        return counts
    layout = plan.token_array("positions")
    for index in range(layout.n_shards):
        problem = f"is part of {n_rows} chosen positions where {plan.n_rows} were planned"
        inspection.report(layout.key(index), problem, run=plan.run)
    return None
