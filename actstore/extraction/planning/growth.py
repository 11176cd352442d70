"""Finding the place of a job in a store: a new run, a run to go on with, or none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from actstore.errors import PlanMismatchError
from actstore.extraction.planning.differences import OF_A_RUN, differences
from actstore.extraction.planning.tokenising.source_files import are_same, is_same
from actstore.store.format.plan import FIRST_RUN, LAST_RUN, Plan, Request
from actstore.store.records.run import Run

_OF_A_STORE: Final = frozenset({"tokens.context_length", "tokens.positions"})
"""Fields of tokens that all runs of a store share."""


@dataclass(frozen=True)
class Place:
    """The place of one run in a store."""

    name: str
    hooks: tuple[str, ...]
    """Names of the hooks that the run stores."""
    run: Run | None = None
    """The run itself, if the store has it."""
    over: Plan | None = None
    """The plan with the tokens of a new run that adds hooks; else None."""
    skipped: tuple[Plan, ...] = ()
    """Plans that hold the first sequences of the text of a new run that adds tokens."""
    n_slots: int | None = None
    """Slots of a sequence in the store that tokens are added to; None for a new store, and if all positions are stored.
    """

    @property
    def arrays(self) -> tuple[str, ...]:
        """Paths of the arrays that a new run writes."""
        part = self.name if self.over is None else self.over.tokens_of
        prefix = "" if part == FIRST_RUN else f"parts/{part}/"
        return (*(f"{prefix}acts/{hook}" for hook in self.hooks), f"{prefix}norms/{self.name}")


class PromptList(Protocol):
    """A list of prompts, of which parts can be compared with lists that are stored."""

    def url_of(self, start: int, stop: int) -> str:
        """The source that some of its prompts alone would be, by number."""


def find_place(
    url: str,
    runs: Sequence[Run],
    request: Request,
    *,
    segment_size: int | None = None,
    append: bool = False,
    prompts: PromptList | None = None,
) -> Place:
    """Find the run of a store that a request describes.

    Args:
        url: URL of the store, for messages.
        runs: runs of the store.
        request: request of the job.
        segment_size: segment size that the job demands, if any.
        append: whether other tokens become a further run.
        prompts: the tokens of the request, if they are prompts in memory.

    Raises:
        PlanMismatchError: the request fits no run, and cannot be a new one; the message names the differences.
    """
    hooks = tuple(hook.name for hook in request.hooks)
    if not runs:
        return Place(FIRST_RUN, hooks)
    for run in runs:
        if not differences(run.plan.request, request):
            return _continue_run(url, run, runs, segment_size)
    name = following_name(url, runs[-1].plan.run)
    for run in runs:
        if run.plan.has_own_tokens and not differences(run.plan.request, request, but=OF_A_RUN):
            over = [other for other in runs if other.plan.tokens_of == run.plan.run]
            return _over_stored_tokens(url, run, over, request, name, segment_size)
    first = runs[0].plan.request
    lines = differences(first, request)
    tokens = {line.split(" is ")[0] for line in lines if line.startswith("tokens.")}
    others = differences(first, request, but=OF_A_RUN | (tokens - _OF_A_STORE))
    if append and not others:
        skipped = _of_same_text(url, runs, request) or _first_prompts(runs, request, prompts)
        return Place(name, hooks, skipped=skipped, n_slots=runs[0].plan.n_slots)
    advice = "Choose another out, or run the job it was made with"
    if not others:
        lines = differences(first, request, but=OF_A_RUN)
        advice += "; to add these tokens to the store as a further run, give --append"
    elif append:
        lines = others
        if any(line.startswith("tokens.context_length ") for line in others):
            advice = (
                "All runs of a store have sequences of one length: shorten what is to be added, or choose another out, "
                "and a context_length there (--context-length) that leaves room for it"
            )
    raise PlanMismatchError(f"the store at {url} belongs to another plan: {'; '.join(lines)}. {advice}")


def following_name(url: str, run: str) -> str:
    """The name of the run after another one.

    Raises:
        PlanMismatchError: there is none, since names have four digits.
    """
    if run == LAST_RUN:
        raise PlanMismatchError(
            f"the store at {url} has a run {run}, and no run comes after that; choose another out"
        )
    return f"{int(run) + 1:04d}"


def _of_same_text(url: str, runs: Sequence[Run], request: Request) -> tuple[Plan, ...]:
    """Plans of runs with sequences of the text of a job. Whether they are its first ones is checked when it is read.

    Raises:
        PlanMismatchError: some have another packing, or are of files that have changed since.
    """
    asked = request.tokens
    parts = [run.plan for run in runs if run.plan.has_own_tokens]
    # Paths can be spelled in many ways; files have a name, a size and mostly a checksum.
    named = {file.name: file for file in asked.files}
    same = [
        plan
        for plan in parts
        if plan.request.tokens.source == asked.source
        or any(is_same(file, named[file.name]) for file in plan.request.tokens.files if file.name in named)
    ]
    for plan in same:
        stored = plan.request.tokens
        lines = differences(plan.request, request, but=OF_A_RUN | {"tokens.files", "tokens.max_tokens"})
        if not are_same(stored.files, asked.files[: len(stored.files)]):
            lines.append("its files have changed, or are not the first ones that this job reads")
        if lines:
            raise PlanMismatchError(
                f"the store at {url} has sequences of {asked.source} already, and cannot tell which of them this job "
                f"would repeat: {'; '.join(lines)}. Name only the new files, or choose another out"
            )
    return tuple(same)


def _first_prompts(runs: Sequence[Run], request: Request, prompts: PromptList | None) -> tuple[Plan, ...]:
    """Plans that hold the first prompts of a longer list, with all the hooks that are asked for."""
    if prompts is None:
        return ()
    asked = {hook.name for hook in request.hooks}
    alike = OF_A_RUN | {"tokens.files", "tokens.max_tokens"}
    found: list[Plan] = []
    n = 0
    for plan in (run.plan for run in runs if run.plan.has_own_tokens):
        stored = {hook for run in runs if run.plan.tokens_of == plan.run for hook in run.plan.hook_names}
        if plan.request.tokens.packing != "document" or not asked <= stored:
            continue
        if differences(plan.request, request, but=alike):
            continue
        # A run that added the rest of a longer list is of that list; any other run is of its own.
        skip, stop = plan.request.tokens.skip_sequences, n + plan.n_sequences
        if skip in (0, n) and prompts.url_of(n - skip, stop) == plan.request.tokens.source:
            found.append(plan)
            n = stop
    return tuple(found)


def _continue_run(url: str, run: Run, runs: Sequence[Run], segment_size: int | None) -> Place:
    part = next(other for other in runs if other.plan.run == run.plan.tokens_of)
    if part is not run and not part.has_tokens:
        raise PlanMismatchError(
            f"the tokens of run {part.plan.run} of the store at {url} are not complete; run the job it was made with "
            f"(hooks {part.plan.hook_listing}) first"
        )
    if segment_size not in (None, run.plan.segment_size):
        raise PlanMismatchError(
            f"the store at {url} belongs to another plan: segment_size is {run.plan.segment_size} in the store, "
            f"{segment_size} was asked for. Choose another out, or run the job it was made with"
        )
    return Place(run.plan.run, run.plan.hook_names, run)


def _fits(run: Run, request: Request, segment_size: int | None) -> bool:
    return segment_size in (None, run.plan.segment_size) and not differences(
        run.plan.request, request, but={"hooks"}
    )


def _over_stored_tokens(
    url: str, part: Run, runs: Sequence[Run], request: Request, name: str, segment_size: int | None
) -> Place:
    """Find the place of a request whose tokens are in the store; its hooks may be, all or some of them.

    Raises:
        PlanMismatchError: a run must be completed first, or the hooks are stored in another way.
    """
    asked = [hook.name for hook in request.hooks]
    missing = tuple(hook for hook in asked if not any(run.hook(hook) for run in runs))
    unfinished = [run for run in runs if not run.is_complete or (run is part and not run.has_tokens)]
    if missing and unfinished:
        raise PlanMismatchError(
            f"run {unfinished[0].plan.run} of the store at {url} is not complete; complete it with the job it was "
            f"made with (hooks {unfinished[0].plan.hook_listing}), then add {', '.join(missing)}"
        )
    if missing:
        return Place(name, missing, over=part.plan)
    holding = [run for run in runs if any(run.hook(hook) for hook in asked)]
    needed = next((run for run in holding if run in unfinished), None)
    if needed is None:
        # Nothing is left to do. A job that once added hooks says how these are stored; runs with its other hooks may
        # be stored in another way.
        fitting = (run for run in holding if _fits(run, request, segment_size))
        needed = next(fitting, holding[0])
    lines = differences(needed.plan.request, request, but={"hooks"})
    if needed in unfinished and not set(needed.plan.hook_names) <= set(asked):
        lines += differences(needed.plan.request, request)
    if lines:
        raise PlanMismatchError(
            f"the store at {url} belongs to another plan: {'; '.join(lines)}. Choose another out, or run the job it "
            "was made with"
        )
    return _continue_run(url, needed, (part, *runs), segment_size)
