"""Storage at half the speed of the model: the worker waits, and holds no more memory the longer it lasts."""

from pathlib import Path

import pytest

from tests.conftest import S3Server, TinyModel
from tests.faults.child import Child, run
from tests.faults.conftest import Fields, MakeFields, Undisturbed
from tests.faults.finished import check_finished
from tests.faults.proxy import FaultProxy, Throttle

N_SHORT, N_LONG = 6, 24


@pytest.fixture(scope="session")
def wide_fields(make_fields: MakeFields, tiny_model: TinyModel) -> MakeFields:
    """As `make_fields`, with segments of 8 MiB."""

    def make(out: str | Path, n_segments: int = N_SHORT) -> Fields:
        wide = {"model": str(tiny_model("gpt2", n_layer=2, n_embd=2048, n_head=4))}
        return make_fields(out, n_segments) | wide

    return make


@pytest.mark.faults
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
        # At half the speed, about half of the time is spent waiting.
        assert outcome.report["seconds_waiting"] > 0.3 * outcome.report["seconds_running"]
        check_finished(fields["out"], undisturbed(fields), s3_server)
    assert peaks[1] - peaks[0] < segment_nbytes
