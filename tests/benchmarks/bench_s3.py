"""Shards to and from S3 (SeaweedFS), compared with boto3, obstore and s3fs moving the same bytes."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.storage.blobs import Blobs
from actstore.storage.s3_fsspec import S3fsBlobs
from actstore.storage.s3_obstore import ObjectBlobs
from tests import conftest
from tests.benchmarks.measure import Against, Result, Side, Speed, Work, interleaved

NBYTES = 64 << 20
TAIL = bytes(1036)
"""The index that follows the data of a shard."""
Act = Callable[[str], object]
RawPut = Callable[[str, bytes], object]


@contextmanager
def server() -> Iterator[conftest.S3Server]:
    """Start SeaweedFS, with its address in the environment."""
    with (
        tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder,
        ExitStack() as stack,
    ):
        started, process = conftest._start_weed(Path(folder))
        stack.callback(conftest._stop, process)
        conftest._make_bucket(started, process, Path(folder))
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        environment.setenv("AWS_ENDPOINT_URL", started.endpoint)
        environment.setenv("AWS_ACCESS_KEY_ID", "admin")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            environment.setenv(name, os.devnull)
        yield started


def raw_clients(started: conftest.S3Server) -> dict[str, tuple[RawPut, Act]]:
    """Put and get of each library, as in its manual."""
    import boto3
    import obstore
    from obstore.store import S3Store

    boto = boto3.client("s3")
    store = S3Store(started.bucket, client_options={"allow_http": True}, virtual_hosted_style_request=False)
    files: Any = fsspec.filesystem("s3")
    bucket = started.bucket
    return {
        "boto3": (
            lambda key, body: boto.put_object(Bucket=bucket, Key=key, Body=body),
            lambda key: boto.get_object(Bucket=bucket, Key=key)["Body"].read(),
        ),
        "obstore": (
            lambda key, body: obstore.put(store, key, body, use_multipart=False),
            lambda key: obstore.get(store, key).bytes(),
        ),
        "s3fs": (
            lambda key, body: files.pipe_file(f"{bucket}/{key}", body, chunksize=len(body)),
            lambda key: files.cat_file(f"{bucket}/{key}"),
        ),
    }


def run() -> list[Result]:
    """Measure all sides in turns. Ours puts two parts, create-only, and gets into reused memory, as a store does."""
    data: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, NBYTES, dtype=np.uint8)
    whole = data.tobytes() + TAIL
    out = np.zeros(len(whole), np.uint8)
    numbers = itertools.count()

    def moved(act: Act, *, fresh: bool) -> Work:
        key = f"run/{next(numbers)}" if fresh else "run/there"
        started_at = time.perf_counter()
        act(key)
        seconds = time.perf_counter() - started_at
        if fresh:
            cleaner.delete_object(Bucket=started.bucket, Key=key)  # the disk is not measured
        return Work(len(whole), seconds)

    def put(blobs: Blobs, key: str) -> None:
        if not blobs.create(key, [data, TAIL]):
            raise RuntimeError(f"{key} was there before")

    with server() as started:
        ours: dict[str, Blobs] = {
            "obstore": ObjectBlobs(f"s3://{started.bucket}"),
            "s3fs": S3fsBlobs(f"s3://{started.bucket}"),
        }
        raw, cleaner = raw_clients(started), started.client()
        put(ours["obstore"], "run/there")
        puts: dict[str, Side] = {}
        gets: dict[str, Side] = {}
        for name, blobs in ours.items():
            puts[f"ours {name}"] = partial(moved, partial(put, blobs), fresh=True)
            gets[f"ours {name}"] = partial(moved, partial(_get, blobs, out), fresh=False)
        for name, (raw_put, raw_get) in raw.items():
            puts[name] = partial(moved, partial(_put_raw, raw_put, whole), fresh=True)
            gets[name] = partial(moved, raw_get, fresh=False)
        # The server takes longer for a conditional put, and of the raw puts only this one has a condition.
        puts["s3fs create-only"] = partial(
            moved, partial(_put_raw, partial(_create_raw, started.bucket), whole), fresh=True
        )
        results: list[Result] = []
        for verb, sides in (("put", puts), ("get", gets)):
            rates = interleaved(sides)
            best = max(raw, key=lambda client: rates[client].median)
            same = "s3fs create-only" if verb == "put" else "s3fs"
            what = f"S3 {verb} of 64 MiB, SeaweedFS"
            fastest = Against(f"best raw client: {best}", rates[best], 0.9, is_limit=True)
            own = Against(f"raw {same}", rates[same], 0.9, is_limit=True)
            results += [
                Speed(f"{what}: obstore", "MB/s", rates["ours obstore"], (fastest,), 1e6),
                Speed(f"{what}: s3fs", "MB/s", rates["ours s3fs"], (own,), 1e6),
            ]
        if out.tobytes() != whole:
            raise RuntimeError("other bytes came back than were put")
    return results


def _get(blobs: Blobs, out: NDArray[np.uint8], key: str) -> None:
    blobs.read_into(key, 0, out)


def _put_raw(put: RawPut, body: bytes, key: str) -> None:
    put(key, body)


def _create_raw(bucket: str, key: str, body: bytes) -> None:
    fsspec.filesystem("s3").pipe_file(f"{bucket}/{key}", body, mode="create", chunksize=len(body))
