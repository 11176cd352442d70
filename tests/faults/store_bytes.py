"""What a store consists of, object by object, whatever wrote it."""

import hashlib
import os
from pathlib import Path

from tests.conftest import S3Server

LEFTOVERS = ("_actstore/partial/", "_actstore/probe/", "_actstore/leases/")
"""Where killed runs may leave objects that nobody reads."""


def store_bytes(url: str, server: S3Server | None = None) -> dict[str, str]:
    """BLAKE2b of every object by key, leftovers not counted.

    Args:
        url: folder, or ``s3://bucket/prefix``.
        server: where the bucket is; it is asked directly, not through actstore.
    """
    return {key: digest for key, digest in _objects(url, server).items() if not key.startswith(LEFTOVERS)}


def leftovers(url: str, server: S3Server | None = None) -> list[str]:
    """Keys that killed runs have left."""
    return sorted(key for key in _objects(url, server) if key.startswith(LEFTOVERS))


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Which objects are missing, too many or other than expected; empty if none."""
    keys = sorted(found.keys() | expected.keys())
    kinds = {(False, True): "missing", (True, False): "unexpected", (True, True): "different"}
    return [
        f"{kinds[key in found, key in expected]}: {key}"
        for key in keys
        if found.get(key) != expected.get(key)
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
