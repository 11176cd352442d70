"""Finding the place of a job in a store, from plans alone."""

from typing import Any

import pytest

from actstore.errors import PlanMismatchError
from actstore.extraction.planning.growth import Place, find_place
from actstore.store.format.plan import Plan, Request, SourceFileIdentity
from actstore.store.records.commit import ObjectRecord
from actstore.store.records.manifest import FinishedRun, shards_key, statistics_key
from actstore.store.records.run import Run
from tests.store.example import HOOKS, example_plan
from tests.store.runs import ATTN_OUT, MLP_OUT, hooks_run, with_hooks

URL = "/runs/a"
FIRST = example_plan()


def asking(*hooks: str, plan: Plan = FIRST, **changes: Any) -> Request:
    """A request for these hooks; ``tokens__seed=3`` changes a field of a part."""
    request = with_hooks(plan, *hooks).request
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        if part:
            request = request.model_copy(
                update={part: getattr(request, part).model_copy(update={field: value})}
            )
        else:
            request = request.model_copy(update={name: value})
    return request


def other_tokens(*hooks: str) -> Request:
    return asking(*hooks, tokens__source="more.txt", tokens__files=(), tokens__seed=3)


def done(plan: Plan) -> Run:
    def record(key: str) -> ObjectRecord:
        return ObjectRecord(key=key, nbytes=1, crc32c=1)

    run = plan.run
    entry = FinishedRun(plan=plan, shards=record(shards_key(run)), statistics=record(statistics_key(run)))
    return Run(plan, range(plan.n_segments), plan.has_own_tokens, entry)


def begun(plan: Plan, *committed: int, has_tokens: bool = True) -> Run:
    return Run(plan, set(committed), has_tokens and plan.has_own_tokens, None)


def as_run(run: str, request: Request, **changes: Any) -> Plan:
    return FIRST.model_copy(update={"run": run, "tokens_of": run, "request": request} | changes)


A, B, C = HOOKS, (MLP_OUT,), (ATTN_OUT,)
RUN_A = done(FIRST)
RUN_B = done(hooks_run("0001", *B))
PART = done(as_run("0001", other_tokens(*A)))
BEGUN_B = begun(hooks_run("0001", MLP_OUT, ATTN_OUT), 0)


def first_hooks(*names: str) -> Request:
    """The hooks of the first run with their shapes."""
    hooks = tuple(hook for hook in FIRST.request.hooks if hook.name in names)
    return FIRST.request.model_copy(update={"hooks": hooks})


def and_hooks(*names: str, **changes: Any) -> Request:
    """A request for all hooks of the first run and these."""
    request = asking(*names, **changes)
    return request.model_copy(update={"hooks": (*FIRST.request.hooks, *request.hooks)})


@pytest.mark.parametrize(
    ("runs", "request_", "expected"),
    [
        ([], FIRST.request, Place("0000", A)),
        ([RUN_A], FIRST.request, Place("0000", A, RUN_A)),
        ([begun(FIRST, 1)], FIRST.request, Place("0000", A, begun(FIRST, 1))),
        ([RUN_A], first_hooks(A[1]), Place("0000", A, RUN_A)),
        ([RUN_A], asking(*B), Place("0001", B, over=FIRST)),
        ([RUN_A], and_hooks(*B), Place("0001", B, over=FIRST)),
        ([RUN_A, RUN_B], asking(*B), Place("0001", B, RUN_B)),
        ([RUN_A, RUN_B], FIRST.request, Place("0000", A, RUN_A)),
        ([RUN_A, RUN_B], and_hooks(*B), Place("0000", A, RUN_A)),
        ([RUN_A, RUN_B], and_hooks(*B, *C), Place("0002", C, over=FIRST)),
        ([RUN_A, RUN_B], asking(*C, compression="lz4", covariance=True), Place("0002", C, over=FIRST)),
        ([RUN_A, BEGUN_B], asking(MLP_OUT, ATTN_OUT), Place("0001", (MLP_OUT, ATTN_OUT), BEGUN_B)),
        ([RUN_A, BEGUN_B], and_hooks(MLP_OUT, ATTN_OUT), Place("0001", (MLP_OUT, ATTN_OUT), BEGUN_B)),
        ([RUN_A, BEGUN_B], FIRST.request, Place("0000", A, RUN_A)),
        ([RUN_A, BEGUN_B], first_hooks(A[0]), Place("0000", A, RUN_A)),
        ([RUN_A, PART], other_tokens(*B), Place("0002", B, over=PART.plan)),
        ([RUN_A, PART], asking(*B), Place("0002", B, over=FIRST)),
        ([RUN_A, PART], PART.plan.request, Place("0001", A, PART)),
        ([RUN_A, done(hooks_run("0004", *B))], asking(*C), Place("0005", C, over=FIRST)),
        (
            [RUN_A],
            asking(
                *B,
                model__name="/elsewhere",
                model__revision="main",
                model__config={},
                tokens__source="s3://b/t",
                tokens__tokenizer="b",
            ),
            Place("0001", B, over=FIRST),
        ),
    ],
    ids=[
        "no store",
        "all of it",
        "all of it, unfinished",
        "some of it",
        "more",
        "it and more",
        "what was added",
        "the first again",
        "both again",
        "both and more",
        "more, stored otherwise",
        "what is being added",
        "the first and what is being added",
        "the first beside what is being added",
        "some of it beside what is being added",
        "more over another part",
        "more over the first part",
        "the part again",
        "after a gap",
        "spelled otherwise",
    ],
)
def test_place(runs: list[Run], request_: Request, expected: Place) -> None:
    for append in (False, True):
        assert find_place(URL, runs, request_, append=append) == expected


def test_other_tokens_are_a_run_of_their_own_if_that_is_wanted() -> None:
    for runs, name in (([RUN_A], "0001"), ([RUN_A, PART], "0002"), ([begun(FIRST, 0)], "0001")):
        request = asking(*B, tokens__source="third.txt", tokens__max_tokens=80)
        place = find_place(URL, runs, request, append=True)
        assert place == Place(name, B)
        acts = (f"parts/{name}/acts/{hook}" for hook in B)
        assert place.arrays == (*acts, f"parts/{name}/norms/{name}")


@pytest.mark.parametrize(
    ("request_", "advice"),
    [
        (asking(*A, tokens__seed=3), True),
        (asking(*A, tokens__packing="document", tokens__pad_token=1), True),
        (asking(*B, compression="zstd", tokens__max_tokens=80), True),
        (asking(*A, tokens__context_length=16), False),
        (asking(*A, tokens__seed=3, dtype="bfloat16"), False),
        (asking(*A, dtype="bfloat16"), False),
        (asking(*B, dtype="bfloat16"), False),
        (asking(*B, batch_size=4), False),
        (asking(*B, model__fingerprint="crc32c:1"), False),
        (asking(*B, tokens__seed=3, model__fingerprint="crc32c:1"), False),
    ],
    ids=[
        "seed", "packing", "other hooks, too", "context", "seed and dtype", "dtype", "hooks and dtype",
        "hooks and batches", "hooks and model", "tokens and model",
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(request_: Request, advice: bool) -> None:
    with pytest.raises(PlanMismatchError) as caught:
        find_place(URL, [RUN_A], request_)
    text = str(caught.value)
    assert text.startswith(f"the store at {URL} belongs to another plan: ")
    assert "was asked for" in text
    assert ("to add these tokens to the store as a further run, give --append" in text) == advice
    if not advice:
        with pytest.raises(PlanMismatchError):
            find_place(URL, [RUN_A], request_, append=True)


@pytest.mark.parametrize(
    ("runs", "request_", "message"),
    [
        (
            [begun(FIRST, 0)],
            asking(*B),
            rf"run 0000 .* \(hooks blocks\.\*\.hook_resid_post and {A[2]}\), then add {MLP_OUT}",
        ),
        (
            [begun(FIRST, 0, 1, 2, has_tokens=False)],
            asking(*B),
            "run 0000 of the store .* is not complete",
        ),
        (
            [RUN_A, begun(hooks_run("0001", *B), 0)],
            and_hooks(*B, *C),
            rf"run 0001 .* \(hooks {MLP_OUT}\), then add {ATTN_OUT}",
        ),
        ([begun(FIRST, 0)], first_hooks(A[0]), f"hooks is {', '.join(A)} in the store, {A[0]} was asked for"),
        (
            [RUN_A, BEGUN_B],
            asking(MLP_OUT),
            f"hooks is {MLP_OUT}, {ATTN_OUT} in the store, {MLP_OUT} was asked for",
        ),
        ([RUN_A, BEGUN_B], asking(MLP_OUT, ATTN_OUT, compression="lz4"), "compression is null in the store"),
        ([RUN_A], first_hooks(A[0]).model_copy(update={"compression": "lz4"}), "compression is null in the"),
        ([RUN_A, RUN_B], and_hooks(*B, covariance=True), "covariance is false in the store, true was asked"),
    ],
    ids=[
        "more over an unfinished run",
        "more over tokens that are not there",
        "more beside an unfinished run",
        "some of an unfinished run",
        "some of an unfinished addition",
        "an unfinished addition, stored otherwise",
        "some of it, stored otherwise",
        "both, stored otherwise",
    ],
)
def test_what_cannot_be_done_now_is_told(runs: list[Run], request_: Request, message: str) -> None:
    for append in (False, True):
        with pytest.raises(PlanMismatchError, match=message):
            find_place(URL, runs, request_, append=append)


def files(*sizes: int) -> tuple[SourceFileIdentity, ...]:
    return tuple(SourceFileIdentity(name=f"{i}.txt", nbytes=nbytes) for i, nbytes in enumerate(sizes))


@pytest.mark.parametrize(
    ("asked", "is_same"),
    [
        (files(10, 20), True),
        (files(10, 20, 30), True),
        (files(10, 21), False),
        (files(10, 21, 30), False),
        (files(10), False),
        (files(20, 10)[::-1], False),
    ],
    ids=["more of it", "a further file", "one that changed", "both", "one that is gone", "in another order"],
)
def test_text_that_the_store_has_in_part_is_gone_on_with_if_it_is_the_same(
    asked: tuple[SourceFileIdentity, ...], is_same: bool
) -> None:
    """Otherwise some of its sequences would be stored twice, without anybody knowing which."""
    stored = as_run("0000", asking(*A, tokens__files=files(10, 20)))
    request = asking(*A, tokens__files=asked, tokens__max_tokens=80)
    if is_same:
        assert find_place(URL, [done(stored)], request, append=True).skipped == (stored,)
        return
    with pytest.raises(
        PlanMismatchError,
        match="its files have changed, or are not the first ones that this job reads. Name only",
    ):
        find_place(URL, [done(stored)], request, append=True)


def test_segments_of_another_size() -> None:
    def place(runs: list[Run], request: Request, size: int) -> Place:
        return find_place(URL, runs, request, segment_size=size)

    assert place([RUN_A], FIRST.request, 16).run == RUN_A
    assert place([RUN_A], asking(*B), 32) == Place("0001", B, over=FIRST)
    for request in (FIRST.request, first_hooks(A[0])):
        with pytest.raises(PlanMismatchError, match="segment_size is 16 in the store, 32 was asked for"):
            place([RUN_A], request, 32)


def test_the_command_that_added_hooks_has_nothing_to_do_once_it_is_done() -> None:
    """The job also named hooks that were there before, which are stored in another way."""
    request = and_hooks(*B, compression="lz4")
    place = find_place(URL, [RUN_A], request, segment_size=32)
    assert place == Place("0001", B, over=FIRST)
    added = hooks_run("0001", *B, segment_size=32)
    added = added.model_copy(update={"request": added.request.model_copy(update={"compression": "lz4"})})
    for run in (begun(added, 0), done(added)):
        assert find_place(URL, [RUN_A, run], request, segment_size=32) == Place("0001", B, run)


@pytest.mark.parametrize(
    ("place", "arrays"),
    [
        (Place("0000", B), (f"acts/{MLP_OUT}", "norms/0000")),
        (Place("0003", B, over=FIRST), (f"acts/{MLP_OUT}", "norms/0003")),
        (Place("0003", B), (f"parts/0003/acts/{MLP_OUT}", "parts/0003/norms/0003")),
        (Place("0003", B, over=PART.plan), (f"parts/0001/acts/{MLP_OUT}", "parts/0001/norms/0003")),
    ],
)
def test_where_a_new_run_writes(place: Place, arrays: tuple[str, ...]) -> None:
    assert place.arrays == arrays


def test_no_run_comes_after_the_last() -> None:
    last = done(FIRST).__class__(
        FIRST.model_copy(update={"run": "9999", "tokens_of": "9999"}), (), has_tokens=True, finished=None
    )
    with pytest.raises(
        PlanMismatchError, match="has a run 9999, and no run comes after that; choose another"
    ):
        find_place(URL, [done(FIRST), last], other_tokens(*HOOKS), append=True)
