"""Eight processes extract the same store at the same moment, without knowing of each other."""

from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.faults.child import Child, Stop
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.finished import check_finished

N_RACERS = 8


def race(fields: Fields, stop: Stop, environment: dict[str, str] | None = None) -> None:
    """Start all processes, let them go on at once from the same place, and check that each ends well."""
    racers = [Child(fields, environment, stop=stop) for _ in range(N_RACERS)]
    for racer in racers:
        racer.reached()
    for racer in racers:
        racer.go()
    outcomes = [racer.outcome() for racer in racers]
    assert [outcome.error for outcome in outcomes] == [""] * N_RACERS
    assert all(outcome.report for outcome in outcomes)
    n_tokens = {outcome.report["n_tokens"] for outcome in outcomes}
    assert len(n_tokens) == 1


@pytest.mark.parametrize("stop", ["start", "planned"])
def test_eight_processes_extract_one_store_on_disk(
    make_fields: MakeFields, undisturbed: Undisturbed, tmp_path: Path, stop: Stop
) -> None:
    fields = make_fields(tmp_path / "store")
    race(fields, stop)
    check_finished(fields["out"], undisturbed(fields))


@pytest.mark.faults
@pytest.mark.parametrize("stop", ["start", "planned"])
def test_eight_processes_extract_one_store_on_s3(
    make_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    s3_environment: dict[str, str],
    stop: Stop,
) -> None:
    fields = make_fields(s3_url)
    race(fields, stop, s3_environment)
    check_finished(s3_url, undisturbed(fields), s3_server)
