"""Small extractions, what they write when nothing goes wrong, and a proxy in front of the S3 server."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import S3Server, TinyModel
from tests.faults import proxy as fault_proxy
from tests.faults.child import run
from tests.faults.store_bytes import store_bytes

Fields = dict[str, Any]
MakeFields = Callable[..., Fields]
Undisturbed = Callable[[Fields], dict[str, str]]
CLIENTS = ["s3fs", "obstore"]

_ROWS = 16
_LENGTH = 32


@pytest.fixture(scope="session")
def make_fields(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> MakeFields:
    """``make_fields(out, n_segments=6)``: fields of a job with 2 hooks, each segment 2 shards of 128 KiB, and a column
    that is kept.
    """
    model = tiny_model("gpt2", n_layer=2)
    folder = tmp_path_factory.mktemp("ids")

    def make(out: str | Path, n_segments: int = 6) -> Fields:
        path = folder / f"{n_segments}.parquet"
        if not path.exists():
            # The last segment is short, and so is its last batch.
            shape = (n_segments * _ROWS - 5, _LENGTH)
            ids = np.random.default_rng(n_segments).integers(2, 300, shape)
            labels = [f"label {i % 3}" for i in range(len(ids))]
            pq.write_table(pa.table({"input_ids": ids.tolist(), "label": labels}), path)
        return {
            "model": str(model),
            "tokens": str(path),
            "keep": "label",
            "hooks": ["blocks.0.hook_mlp_out", "blocks.1.hook_resid_post"],
            "context_length": _LENGTH,
            "batch_size": 8,
            "segment_size": _ROWS,
            "out": str(out),
        }

    return make


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """``undisturbed(fields)``: digests of the store that this job writes without faults, on the local disk."""
    known: dict[str, dict[str, str]] = {}

    def digests(fields: Fields) -> dict[str, str]:
        key = json.dumps({name: value for name, value in fields.items() if name != "out"})
        if key not in known:
            out = str(tmp_path_factory.mktemp("undisturbed") / "store")
            run(fields | {"out": out})
            known[key] = store_bytes(out)
        return known[key]

    return digests


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[fault_proxy.FaultProxy]:
    """A proxy in front of the S3 server, without faults until it gets a plan."""
    with fault_proxy.proxy(s3_server.endpoint) as made:
        yield made


@pytest.fixture(params=CLIENTS)
def s3_environment(request: pytest.FixtureRequest, s3_server: S3Server) -> dict[str, str]:
    """Environment of processes that reach the S3 server directly, with each of the clients."""
    inherited = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return inherited | {"AWS_ENDPOINT_URL": s3_server.endpoint, "ACTSTORE_S3": request.param}


@pytest.fixture
def proxied(s3_environment: dict[str, str], proxy: fault_proxy.FaultProxy) -> dict[str, str]:
    """Environment of processes that reach the S3 server through the proxy."""
    return s3_environment | {"AWS_ENDPOINT_URL": proxy.url}
