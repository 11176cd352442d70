"""S3 through obstore, which moves bytes outside of Python's interpreter lock."""

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import botocore.credentials  # type: ignore[import-untyped]
import botocore.session  # type: ignore[import-untyped]
import numpy as np
import obstore
from numpy.typing import NDArray
from obstore.store import S3Store

from actstore.reason import reason
from actstore.storage.blobs import BlobInfo, Bytes, view
from actstore.storage.errors import Kind, RequestError, kind_of_reply
from actstore.storage.s3 import CONNECT_TIMEOUT_S, READ_TIMEOUT_S, S3Blobs

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import ClientConfig, S3Config, S3Credential

_PUT_TIMEOUT_S: Final = 600
"""Seconds for a whole PUT. A read timeout would run from the first byte sent, and end every long upload."""
_GET_TIMEOUT_S: Final = 3600
_CREDENTIALS_LAST: Final = timedelta(minutes=5)
"""How long credentials that expire are used. botocore renews them 10 minutes before they expire, so they are valid for
longer than this.
"""
_CHUNK_NBYTES: Final = 1 << 18
"""Bytes of a reply that are copied at once: few enough to be still in the processor's cache then."""
_STATUS: Final = re.compile(r"non-2xx status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>(\w+)</Code>")


class ObjectBlobs(S3Blobs):
    """`S3Blobs` over obstore. A process forked from one that used it must open its own."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._lock = threading.Lock()
        self._stores: tuple[S3Store, S3Store] | None = None

    def _put(
        self, path: str, parts: Sequence[Bytes], metadata: Mapping[str, str], expected: str | None
    ) -> None:
        mode: PutMode = "create" if expected is None else {"e_tag": expected}
        with _translated():
            obstore.put(self._writer, path, list(map(view, parts)), attributes=dict(metadata), mode=mode)

    def _get(self, path: str, start: int, nbytes: int | None, tag: str | None) -> tuple[Bytes, str]:
        options = _conditions(tag)
        if nbytes is not None:
            options["range"] = (start, start + nbytes)
        elif start:
            options["range"] = {"offset": start}
        with _translated():
            reply = obstore.get(self._reader, path, options=options)
            data = reply.bytes()
        return np.frombuffer(memoryview(data), np.uint8) if len(data) else b"", reply.meta["e_tag"] or ""

    def _get_into(self, path: str, start: int, out: NDArray[np.uint8], tag: str | None) -> tuple[int, str]:
        options = _conditions(tag) | {"range": (start, start + out.nbytes)}
        with _translated():
            reply = obstore.get(self._reader, path, options=options)
            place = 0
            for chunk in reply.stream(_CHUNK_NBYTES):
                out[place : place + len(chunk)] = np.frombuffer(chunk, np.uint8)
                place += len(chunk)
        return place, reply.meta["e_tag"] or ""

    def _head(self, path: str) -> BlobInfo | None:
        try:
            with _translated():
                reply = obstore.get(self._reader, path, options={"head": True})
                meta, metadata = reply.meta, reply.attributes
        except RequestError as error:
            if error.kind is Kind.MISSING:
                return None
            raise
        # obstore puts standard headers among the metadata, with capitals, which names of metadata do not have.
        own = {name: value for name, value in metadata.items() if name.islower()}
        return BlobInfo(meta["size"], meta["e_tag"] or "", own)

    def _list(self, folder: str) -> tuple[dict[str, int], set[str]]:
        with _translated():
            listing = obstore.list_with_delimiter(self._reader, folder.rstrip("/") or None)
        return {entry["path"]: entry["size"] for entry in listing["objects"]}, set(listing["common_prefixes"])

    def _sign(self, path: str, seconds: int) -> str:
        with _translated():
            return obstore.sign(self._reader, "GET", path, timedelta(seconds=seconds))

    def _delete(self, path: str) -> None:
        with _translated():
            obstore.delete(self._writer, path)

    @property
    def _reader(self) -> S3Store:
        return self._connected()[0]

    @property
    def _writer(self) -> S3Store:
        return self._connected()[1]

    def _connected(self) -> tuple[S3Store, S3Store]:
        """The clients, made at the first request with the credentials that there are then."""
        with self._lock:
            if self._stores is None:
                self._stores = _connect(self._bucket)
            return self._stores


def _conditions(tag: str | None) -> Any:
    """Options of a GET that requires this ETag, or accepts any if it is None."""
    return {} if tag is None else {"if_match": tag}


def _connect(bucket: str) -> tuple[S3Store, S3Store]:
    """Make a client for reading, and one for writing."""
    session = botocore.session.get_session()
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or session.get_scoped_config().get("endpoint_url")
    )
    config: S3Config = {
        "region": session.get_config_variable("region") or "us-east-1",
        # Not every server supports the request that deletes many objects.
        "disable_bulk_delete": True,
    }
    if endpoint:
        config["endpoint"] = endpoint
    credentials = _Credentials(session)

    def client(timeouts: "ClientConfig") -> S3Store:
        return S3Store(
            bucket,
            config=config,
            client_options={
                "allow_http": bool(endpoint) and endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=CONNECT_TIMEOUT_S),
                **timeouts,
            },
            retry_config={"max_retries": 0},
            credential_provider=credentials,
        )

    return (
        client(
            {
                "read_timeout": timedelta(seconds=READ_TIMEOUT_S),
                "timeout": timedelta(seconds=_GET_TIMEOUT_S),
            }
        ),
        client({"timeout": timedelta(seconds=_PUT_TIMEOUT_S)}),
    )


class _Credentials:
    """Gives obstore the credentials that botocore finds in the environment, a profile, the container or instance."""

    def __init__(self, session: Any) -> None:
        self._credentials = session.get_credentials()
        if self._credentials is None:
            raise RequestError(Kind.NO_CREDENTIALS, "none found")

    def __call__(self) -> "S3Credential":
        now = self._credentials.get_frozen_credentials()
        can_expire = isinstance(self._credentials, botocore.credentials.RefreshableCredentials)
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_LAST if can_expire else None,
        }


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Turn what obstore and botocore raise into `RequestError`."""
    try:
        yield
    except (
        obstore.exceptions.BaseError,
        OSError,
        ValueError,
    ) as error:  # ValueError: a bad path or endpoint
        text, _, details = str(error).partition("\n\nDebug source:")
        raise RequestError(_kind(error, text, details), reason(text)) from error
    except botocore.exceptions.BotoCoreError as error:
        raise RequestError(Kind.NO_CREDENTIALS, reason(error)) from error


def _kind(error: Exception, text: str, details: str) -> Kind:
    """The kind of an error, mostly from its text, since obstore has few types of errors."""
    if status := _STATUS.search(text):
        code = _CODE.search(text)
        return kind_of_reply(int(status[1]), code[1] if code else "")
    if isinstance(error, obstore.exceptions.UnauthenticatedError):
        return Kind.NO_CREDENTIALS
    if "HTTP error" in text:
        return Kind.UNREACHABLE if "kind: Connect," in details else Kind.BROKEN
    return Kind.OTHER
