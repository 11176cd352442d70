"""Extraction to storage with half the throughput of the model: the memory of the worker does not grow with the run."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from actstore.demo import MODEL_PATH
from tests.benchmarks.bench_s3 import server
from tests.benchmarks.measure import Figure, Result
from tests.faults import child
from tests.faults.child import Child, Outcome
from tests.faults.proxy import Throttle, proxy

_LENGTH, _SEGMENT = 64, 64
_SHORT, _LONG = 6, 24


def _fields(folder: Path, n_segments: int, out: str) -> dict[str, Any]:
    path = folder / f"slow-{n_segments}.parquet"
    ids = np.random.default_rng(0).integers(2, 500, (n_segments * _SEGMENT, _LENGTH))
    pq.write_table(pa.table({"input_ids": ids.tolist()}), path)
    return {
        "model": str(MODEL_PATH),
        "tokens": str(path),
        "hooks": ["blocks.*.mlp.hook_pre", "blocks.*.mlp.hook_post"],
        "context_length": _LENGTH,
        "batch_size": 16,
        "segment_size": _SEGMENT,
        "out": out,
    }


def throttled(folder: Path) -> tuple[Outcome, Outcome, float]:
    """A short run, one four times as long, and the bytes of a segment."""
    alone = child.run(_fields(folder, _SHORT, str(folder / "slow"))).report
    outcomes = []
    with server() as started, proxy(started.endpoint) as between:
        between.throttle = Throttle(alone["nbytes_written"] / alone["seconds_forward"] / 2)
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        for n_segments in (_SHORT, _LONG):
            fields = _fields(folder, n_segments, f"s3://{started.bucket}/slow-{n_segments}")
            outcome = Child(fields, environment | {"AWS_ENDPOINT_URL": between.url}).outcome()
            if outcome.report["nbytes_written"] != n_segments * alone["nbytes_written"] / _SHORT:
                raise RuntimeError(f"something was dropped: {outcome}")
            outcomes.append(outcome)
    return outcomes[0], outcomes[1], alone["nbytes_written"] / _SHORT


def run(folder: Path) -> list[Result]:
    """Measure how much more memory the long run takes; the target is one segment."""
    short, long, segment_nbytes = throttled(folder)
    waited = long.report["seconds_waiting"] / long.report["seconds_running"]
    name = (
        f"S3 at half the model's rate, {_LONG} segments of {segment_nbytes / 1e6:.0f} MB: the worker waited "
        f"{waited:.0%} of the time; its peak of {long.peak_nbytes / 1e6:,.0f} MB above that of {_SHORT} segments"
    )
    more = (long.peak_nbytes - short.peak_nbytes) / 1e6
    return [Figure(name, more, "MB", segment_nbytes / 1e6)]
