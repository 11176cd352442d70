"""Storage at half the speed of the model: the worker waits, and its memory does not grow with time."""

from pathlib import Path

import pytest

from tests.conftest import S3Server
from tests.faults.child import Child, run
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.finished import check_finished
from tests.faults.proxy import FaultProxy, Throttle

N_SHORT, N_LONG = 6, 24


@pytest.fixture(scope="session")
def wide_fields(make_fields: MakeFields) -> MakeFields:
    """Fields of `make_fields`, with segments of 16 MiB."""

    def make(out: str | Path, n_segments: int = N_SHORT) -> Fields:
        fields = make_fields(out, 8 * n_segments)  # four short rows make one of the model's full context
        hooks = ["blocks.*.mlp.hook_pre", "blocks.*.mlp.hook_post"]
        return fields | {"context_length": 128, "segment_size": 32, "hooks": hooks}

    return make


@pytest.mark.faults
@pytest.mark.alone
def test_the_worker_waits_for_slow_storage(
    wide_fields: MakeFields,
    undisturbed: Undisturbed,
    s3_url: str,
    s3_server: S3Server,
    proxy: FaultProxy,
    proxied: dict[str, str],
    tmp_path: Path,
) -> None:
    report = run(wide_fields(tmp_path / "store")).report
    segment_nbytes = report["nbytes_written"] / N_SHORT
    proxy.throttle = Throttle(report["nbytes_written"] / report["seconds_forward"] / 2)
    peaks = []
    for n_segments in (N_SHORT, N_LONG):
        fields = wide_fields(f"{s3_url}/{n_segments}", n_segments)
        outcome = Child(fields, proxied).outcome()
        assert outcome.report, outcome.error
        peaks.append(outcome.peak_nbytes)
        # At half the speed, half of the time is spent waiting, if no other process wants the processor.
        assert outcome.report["seconds_waiting"] > 0.1 * outcome.report["seconds_running"]
        check_finished(fields["out"], undisturbed(fields), s3_server)
    assert segment_nbytes > 15 << 20
    assert peaks[1] - peaks[0] < segment_nbytes
