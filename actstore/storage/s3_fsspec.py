"""S3 through s3fs."""

import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any, Final

import aiohttp
import botocore.exceptions  # type: ignore[import-untyped]
import botocore.parsers  # type: ignore[import-untyped]
import fsspec
import numpy as np
from aiobotocore.httpsession import AIOHTTPSession  # type: ignore[import-untyped]
from fsspec.asyn import sync
from numpy.typing import NDArray

from actstore.reason import reason
from actstore.storage.blobs import BlobInfo, Bytes, view
from actstore.storage.errors import Kind, RequestError, kind_of_reply
from actstore.storage.s3 import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, S3Blobs


class _Session(AIOHTTPSession):  # type: ignore[misc]
    """A session that repeats no requests, since `Retries` repeats and counts them. aiohttp would repeat them when a
    kept connection breaks.
    """

    async def _get_session(self, proxy_url: str | None) -> aiohttp.ClientSession:
        session: aiohttp.ClientSession = await super()._get_session(proxy_url)
        session._retry_connection = False
        return session


_OPTIONS: Final[dict[str, Any]] = {
    # A cached listing would hide what other workers commit.
    "use_listings_cache": False,
    # A cached client would keep the credentials it was made with, or none, after the environment has new ones.
    "skip_instance_cache": True,
    "config_kwargs": {
        "max_pool_connections": 64,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": READ_TIMEOUT_S,
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "http_session_cls": _Session,
    },
}
_CHUNK_NBYTES: Final = 1 << 18
"""Bytes of a reply that are copied at once: few enough to be still in the processor's cache then."""


class S3fsBlobs(S3Blobs):
    """`S3Blobs` over s3fs. A process forked from one that used it must open its own."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._fs = fsspec.filesystem("s3", **_OPTIONS)
        self._fs.retries = 1  # s3fs counts tries

    def _put(
        self, path: str, parts: Sequence[Bytes], metadata: Mapping[str, str], expected: str | None
    ) -> None:
        # botocore takes nothing but bytes.
        body = parts[0] if len(parts) == 1 and isinstance(parts[0], bytes) else b"".join(map(view, parts))
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": expected}
        self._call("put_object", Key=path, Body=body, Metadata=dict(metadata), **condition)

    def _get(self, path: str, start: int, nbytes: int | None, tag: str | None) -> tuple[Bytes, str]:
        with _translated():
            result: tuple[NDArray[np.uint8], str] = sync(
                self._fs.loop, self._fetched, path, start, nbytes, tag
            )
        return result

    async def _fetched(
        self, path: str, start: int, nbytes: int | None, tag: str | None
    ) -> tuple[NDArray[np.uint8], str]:
        async with self._reply(path, start, nbytes, tag) as reply:
            data = np.empty(reply["ContentLength"], np.uint8)
            return data[: await _fill(data, reply["Body"])], reply.get("ETag", "")

    def _get_into(self, path: str, start: int, out: NDArray[np.uint8], tag: str | None) -> tuple[int, str]:
        with _translated():
            result: tuple[int, str] = sync(self._fs.loop, self._filled, path, start, out, tag)
        return result

    async def _filled(
        self, path: str, start: int, out: NDArray[np.uint8], tag: str | None
    ) -> tuple[int, str]:
        async with self._reply(path, start, out.nbytes, tag) as reply:
            return await _fill(out, reply["Body"]), reply.get("ETag", "")

    @contextlib.asynccontextmanager
    async def _reply(
        self, path: str, start: int, nbytes: int | None, tag: str | None
    ) -> AsyncIterator[dict[str, Any]]:
        last = "" if nbytes is None else start + nbytes - 1
        options = {"Range": f"bytes={start}-{last}"} if start or nbytes is not None else {}
        if tag is not None:
            options["IfMatch"] = tag
        reply = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=path, **options)
        try:
            yield reply
        finally:
            reply["Body"].close()

    def _head(self, path: str) -> BlobInfo | None:
        try:
            reply = self._call("head_object", Key=path)
        except RequestError as error:
            if error.kind is Kind.MISSING:
                return None
            raise
        return BlobInfo(reply["ContentLength"], reply["ETag"], reply["Metadata"])

    def _list(self, folder: str) -> tuple[dict[str, int], set[str]]:
        files: dict[str, int] = {}
        folders: set[str] = set()
        page: dict[str, Any] = {}
        while not page or page["IsTruncated"]:
            rest = {"ContinuationToken": page["NextContinuationToken"]} if page else {}
            page = self._call("list_objects_v2", Prefix=folder, Delimiter="/", **rest)
            files |= {entry["Key"]: entry["Size"] for entry in page.get("Contents", [])}
            folders |= {entry["Prefix"] for entry in page.get("CommonPrefixes", [])}
        return files, folders

    def _sign(self, path: str, seconds: int) -> str:
        with _translated():
            url: str = self._fs.sign(f"{self._bucket}/{path}", expiration=seconds)
        return url

    def _delete(self, path: str) -> None:
        self._call("delete_object", Key=path)

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        with _translated():
            reply: dict[str, Any] = self._fs.call_s3(method, Bucket=self._bucket, **arguments)
        return reply


async def _fill(out: NDArray[np.uint8], body: Any) -> int:
    """Copy a reply's body into memory as it arrives, and return the number of bytes."""
    place = 0
    async for chunk in body.iter_chunks(_CHUNK_NBYTES):
        out[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
        place += len(chunk)
    return place


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what s3fs, botocore and aiohttp raise into `RequestError`."""
    try:
        yield
    except (OSError, botocore.exceptions.BotoCoreError, aiohttp.ClientError) as error:
        raise RequestError(_kind(error), reason(error)) from error


_KINDS: Final[tuple[tuple[Kind, tuple[type[Exception], ...]], ...]] = (
    (
        Kind.NO_CREDENTIALS,
        (
            botocore.exceptions.NoCredentialsError,
            botocore.exceptions.PartialCredentialsError,
            botocore.exceptions.TokenRetrievalError,
            botocore.exceptions.CredentialRetrievalError,
        ),
    ),
    (
        Kind.UNREACHABLE,
        (
            botocore.exceptions.EndpointConnectionError,
            botocore.exceptions.ConnectTimeoutError,
            aiohttp.ClientConnectorError,
        ),
    ),
    (
        Kind.BROKEN,
        (
            botocore.exceptions.HTTPClientError,
            botocore.exceptions.IncompleteReadError,
            botocore.parsers.ResponseParserError,
            aiohttp.ClientError,
            ConnectionError,
            TimeoutError,
        ),
    ),
)


def _kind(error: Exception) -> Kind:
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, botocore.exceptions.ClientError):
            status = below.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return kind_of_reply(status, str(below.response.get("Error", {}).get("Code", "")))
        below = below.__cause__
    return next((kind for kind, types in _KINDS if isinstance(error, types)), Kind.OTHER)
