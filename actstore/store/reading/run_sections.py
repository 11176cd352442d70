"""Finds which rows of an array each run wrote, and which of them are committed."""

from collections.abc import Sequence
from typing import Final

from actstore.store.format.plan import HookArray
from actstore.store.reading.sections import Section
from actstore.store.records.run import Run, runs_over

_AGAIN: Final = "run the extraction again to complete them"


def hook_section(runs: Sequence[Run], part: Run, hook: HookArray) -> Section:
    """The rows of a hook over the tokens of one run.

    Args:
        runs: all runs of the store.
        part: run that wrote the tokens.
        hook: hook of some of the runs. If none of them has it over these tokens, no row is committed.
    """
    for run in runs_over(runs, part):
        if run.hook(hook.name) is not None:
            return Section(run.plan.activations(hook), run.committed.__contains__, _AGAIN)
    why = f"this hook was not extracted over the tokens of run {part.plan.run}; extract it over them"
    return Section(part.plan.activations(hook), lambda _: False, why)


def norm_section(runs: Sequence[Run], part: Run, hook: HookArray) -> tuple[Section, int] | None:
    """The norms of a hook over the tokens of one run.

    Args:
        runs: all runs of the store.
        part: run that wrote the tokens.
        hook: hook of some of the runs.

    Returns:
        The norms of all hooks of the run that has it, and the number of the hook among these; None where its norms are
        not stored.
    """
    for run in runs_over(runs, part):
        if run.hook(hook.name) is not None and run.plan.norms and hook.has_norms:
            layout = run.plan.norm_array()
            return Section(layout, run.committed.__contains__, _AGAIN), layout.hooks.index(hook.name)
    return None


def token_section(part: Run, path: str) -> Section:
    """The rows of an array of tokens that one run wrote.

    Args:
        part: run that wrote the tokens.
        path: path of the array, such as ``lengths``.
    """

    def is_committed(_shard: int) -> bool:
        return part.has_tokens

    return Section(part.plan.token_array(path), is_committed, _AGAIN)
