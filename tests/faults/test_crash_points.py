"""A crash before, within or after any single change to storage; the next run ends with the same bytes."""

from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.faults.child import Child, run
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.crash import EXIT_CODE, Point, points
from tests.faults.fault_plan import Request
from tests.faults.finished import check_finished
from tests.faults.proxy import FaultProxy, Kill
from tests.storage.file_systems import another_disk

N_SEGMENTS = 3
N_PARTS = 6
N_S3_PARTS = 4
N_SAMPLES = 8
N_COLUMNS_SAMPLES = 4
# A step can be absent where threads ran in another order; all but this share must have been reached.
MAX_MISSED = 0.03
N_TRIES = 3


@pytest.fixture(scope="module")
def disk_points(make_fields: MakeFields, tmp_path_factory: pytest.TempPathFactory) -> list[Point]:
    """All places where a run on the local disk can crash, by the steps of an undisturbed one."""
    out = tmp_path_factory.mktemp("watched") / "store"
    outcome = Child(make_fields(out, N_SEGMENTS), watch=True).outcome()
    assert outcome.report, outcome.error
    assert outcome.missed == ()
    calls = {step.call for step in outcome.steps}
    assert {"open", "write", "fsync", "link", "unlink", "mkdir"} <= calls
    crashes = points(list(outcome.steps))
    assert len(crashes) > 250
    return crashes


def crash_on_disk(chosen: list[Point], fields: Fields, expected: dict[str, str]) -> None:
    missed = []
    for i, point in enumerate(chosen):
        for attempt in range(N_TRIES):
            job = fields | {"out": f"{fields['out']}-{i}-{attempt}"}
            exitcode = Child(job, point=point).outcome().exitcode
            assert exitcode in (0, EXIT_CODE), point
            if exitcode == EXIT_CODE:
                break
        else:
            missed.append(point)
        run(job)
        try:
            check_finished(job["out"], expected)
        except AssertionError as error:
            raise AssertionError(f"after a crash {point}: {error}") from error
    assert len(missed) <= MAX_MISSED * len(chosen), missed


def test_crashes_at_some_steps_of_the_disk(
    disk_points: list[Point], make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    step = len(disk_points) // N_SAMPLES
    crash_on_disk(disk_points[step // 2 :: step], fields, undisturbed(fields))


def test_crashes_while_columns_are_written(
    disk_points: list[Point], make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    of_tables = [point for point in disk_points if "/columns" in point.step.name]
    assert {"mkdir", "fsync", "link"} <= {point.step.call for point in of_tables}
    crash_on_disk(of_tables[:: len(of_tables) // N_COLUMNS_SAMPLES], fields, undisturbed(fields))


@pytest.mark.faults
@pytest.mark.parametrize("part", range(N_PARTS))
def test_crashes_at_every_step_of_the_disk(
    disk_points: list[Point], make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path, part: int
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    crash_on_disk(disk_points[part::N_PARTS], fields, undisturbed(fields))


@pytest.mark.faults
def test_crashes_where_activations_lie_on_another_disk(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    with another_disk(tmp_path) as disk:

        def link(name: str) -> None:
            (tmp_path / name).mkdir()
            (disk / name).mkdir()
            (tmp_path / name / "acts").symlink_to(disk / name)

        link("watched")
        outcome = Child(fields | {"out": str(tmp_path / "watched")}, watch=True).outcome()
        assert outcome.report, outcome.error
        assert outcome.missed == ()
        check_finished(str(tmp_path / "watched"), undisturbed(fields))
        every = [point for point in points(list(outcome.steps)) if point.step.name.startswith("acts/")]
        assert {"open", "write", "fsync", "link", "unlink"} <= {point.step.call for point in every}
        chosen = every[len(every) // 10 :: len(every) // 5]
        for i in range(len(chosen)):
            for attempt in range(N_TRIES):
                link(f"store-{i}-{attempt}")
        crash_on_disk(chosen, fields, undisturbed(fields))


def crash_at_requests(
    share: slice,
    fields: Fields,
    expected: dict[str, str],
    proxy: FaultProxy,
    proxied: dict[str, str],
    server: S3Server,
) -> int:
    """Crash before and after each of some writes, each time in a new store, and return the number of crashes."""
    run(fields, proxied)
    writes = [request for request in proxy.requests if request.is_write]
    assert {request.method for request in writes} >= {"PUT"}
    every = [(request, moment) for request in sorted(writes, key=_order) for moment in ("before", "after")]
    missed = []
    for i, (request, moment) in enumerate(every[share]):
        job = fields | {"out": f"{fields['out']}-{i}"}
        proxy.forget()
        child = Child(job, proxied, stop="start")
        proxy.kill = Kill(child.pid, request, "before" if moment == "before" else "after")
        child.reached()
        child.go()
        child.outcome()
        if not proxy.has_killed.is_set():
            missed.append(request)
        proxy.kill = None
        run(job, proxied)
        try:
            check_finished(job["out"], expected, server)
        except AssertionError as error:
            raise AssertionError(f"after a crash {moment} {request}: {error}") from error
    assert len(missed) <= MAX_MISSED * len(every), missed
    return len(every[share]) - len(missed)


def _order(request: Request) -> tuple[str, str, int]:
    return request.method, request.key, request.turn


def test_crashes_at_some_requests(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    proxied: dict[str, str],
) -> None:
    fields = make_fields(s3_url, N_SEGMENTS)
    crash_at_requests(slice(11, None, 35), fields, undisturbed(fields), proxy, proxied, s3_server)


@pytest.mark.faults
@pytest.mark.parametrize("part", range(N_S3_PARTS))
def test_crashes_at_every_request(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    proxied: dict[str, str],
    part: int,
) -> None:
    fields = make_fields(s3_url, N_SEGMENTS)
    share = slice(part, None, N_S3_PARTS)
    n_crashes = crash_at_requests(share, fields, undisturbed(fields), proxy, proxied, s3_server)
    assert n_crashes > 50 // N_S3_PARTS
