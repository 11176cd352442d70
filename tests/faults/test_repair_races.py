"""A repair beside an extraction: one of them must be repeated, and no committed data is lost."""

import random
import time
from pathlib import Path

import pytest

import actstore
from actstore.errors import BusyError, StorageError
from actstore.storage.opening import open_blobs
from actstore.store.records.commit import commit_key
from tests.conftest import S3Server
from tests.faults.child import Child, run
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.finished import check_finished
from tests.faults.store_bytes import differences, store_bytes

N_SEGMENTS = 16
N_ROUNDS = 3
RESUMABLE = ("BusyError: ", "IncompleteError: ")
"""Errors after which the same command can be repeated."""


def race(fields: Fields, rng: random.Random, environment: dict[str, str] | None = None) -> int:
    """Repair again and again while a child extracts, and return how often either had to be repeated."""
    child = Child(fields, environment, stop="start")
    child.reached()
    child.go()
    n_told = 0
    while not child.ends_within(rng.uniform(0.0, 0.02)):
        try:
            actstore.verify(fields["out"], repair=True)
        except BusyError:
            n_told += 1
        except StorageError as error:
            if "there is no actstore store" not in str(error):  # the extraction has just begun
                raise
    outcome = child.outcome()
    assert not outcome.error or outcome.error.startswith(RESUMABLE), outcome.error
    if outcome.report:
        check_complete(fields)
    return n_told + outcome.error.startswith("BusyError: ")


def check_complete(fields: Fields) -> None:
    """Check a store whose run ended well."""
    verification = actstore.verify(fields["out"])
    assert (verification.n_committed, verification.is_complete, verification.findings) == (
        N_SEGMENTS,
        True,
        (),
    )


@pytest.mark.faults
def test_repairs_beside_an_extraction_on_disk(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    rng = random.Random(0)
    n_told = 0
    for turn in range(N_ROUNDS):
        fields = make_fields(tmp_path / str(turn), N_SEGMENTS)
        n_told += race(fields, rng)
        run(fields)
        check_finished(fields["out"], undisturbed(fields))
    assert n_told >= N_ROUNDS


@pytest.mark.faults
def test_repairs_beside_an_extraction_on_s3(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    s3_environment: dict[str, str],
) -> None:
    fields = make_fields(s3_url, N_SEGMENTS)
    assert race(fields, random.Random(0), s3_environment)
    run(fields, s3_environment)
    check_finished(s3_url, undisturbed(fields), s3_server)


def test_extractions_beside_a_repair(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """An extraction that was planned before the repair, and one that comes while the repair reads: both get an error,
    and change nothing.
    """
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    run(fields)
    blobs = open_blobs(fields["out"])
    for key in ("_actstore/manifest.json", commit_key("0000", 3)):
        blobs.delete(key)
    planned = Child(fields, stop="planned")
    planned.reached()
    before = store_bytes(fields["out"])
    errors: list[str] = []

    def go(_nbytes: int) -> None:
        if not errors:
            planned.go()
            errors.extend(child.outcome().error for child in (planned, Child(fields)))
            assert differences(store_bytes(fields["out"]), before) == []

    actstore.verify(fields["out"], repair=True, on_object=go)
    assert len(errors) == 2
    for error in errors:
        assert error.startswith(f"BusyError: {fields['out']} is being repaired by process "), error
    run(fields)
    check_finished(fields["out"], undisturbed(fields))


def test_a_repair_between_plan_and_extraction(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    run(fields)
    blobs = open_blobs(fields["out"])
    blobs.delete("_actstore/manifest.json")
    blobs.delete(commit_key("0000", 3))
    planned = Child(fields, stop="planned")  # for segment 3 only
    planned.reached()
    blobs.delete("acts/blocks.1.hook_resid_post/c.5.0.0")
    assert actstore.verify(fields["out"], repair=True).n_removed
    planned.go()
    outcome = planned.outcome()
    assert outcome.error == ""
    assert outcome.report["n_tokens_computed"] == 2 * 16 * 32
    check_finished(fields["out"], undisturbed(fields))


def test_a_killed_extraction_does_not_keep_repairs_out(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    fields = make_fields(tmp_path / "store", N_SEGMENTS)
    child = Child(fields)
    commits = tmp_path / "store/_actstore/runs/0000/commits"
    while len(list(commits.glob("*.json"))) < 2:
        assert not child.ends_within(0.01)
    with pytest.raises(BusyError, match=f"is being written to by process {child.pid} on "):
        actstore.verify(fields["out"], repair=True)
    child.kill()
    assert child.ends_within(30)
    started = time.monotonic()
    actstore.verify(fields["out"], repair=True)
    assert time.monotonic() - started < 30  # not the 45 s for a process on another machine
    run(fields)
    check_finished(fields["out"], undisturbed(fields))
