"""Digests of the objects of a store, read without actstore."""

import hashlib
import os
from pathlib import Path

from tests.conftest import S3Server

LEFTOVERS = ("_actstore/partial/", "_actstore/probe/", "_actstore/leases/")
"""Prefixes of objects that killed runs may leave, and that nobody reads."""


def store_bytes(url: str, server: S3Server | None = None) -> dict[str, str]:
    """BLAKE2b of every object by key, without leftovers.

    Args:
        url: folder, or ``s3://bucket/prefix``.
        server: S3 server of the bucket, read without actstore.
    """
    return {key: digest for key, digest in _objects(url, server).items() if not key.startswith(LEFTOVERS)}


def leftovers(url: str, server: S3Server | None = None) -> list[str]:
    """Keys that killed runs have left."""
    return sorted(key for key in _objects(url, server) if key.startswith(LEFTOVERS))


def differences(actual: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Lines on objects that are missing, unexpected or different; empty if there are none."""
    keys = sorted(actual.keys() | expected.keys())
    kinds = {(False, True): "missing", (True, False): "unexpected", (True, True): "different"}
    return [
        f"{kinds[key in actual, key in expected]}: {key}"
        for key in keys
        if actual.get(key) != expected.get(key)
    ]


def _objects(url: str, server: S3Server | None) -> dict[str, str]:
    if server is None:
        root = Path(url)
        walk = os.walk(root, followlinks=True)  # folders may be links to other disks
        files = [Path(folder) / name for folder, _, names in walk for name in names]
        return {str(path.relative_to(root)): _digest(path.read_bytes()) for path in files}
    client = server.client()
    bucket, prefix = url.removeprefix("s3://").split("/", 1)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix + "/")
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return {
        key.removeprefix(prefix + "/"): _digest(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        for key in keys
    }


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
