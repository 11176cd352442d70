"""Opens the storage at a URL with the client for its scheme, whose libraries are imported only then."""

import importlib.util
import os

from actstore.errors import MissingExtraError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.urls import LOCAL, S3, check_url, is_served, local_path, scheme_of


def open_blobs(url: str) -> Blobs:
    """The storage below a path or URL: ``runs/a``, ``file:///runs/a``, ``s3://bucket/a``, any fsspec URL.

    S3 is served by obstore where it is installed, else by s3fs; the environment variable ``ACTSTORE_S3`` may name
    one of the two.

    Raises:
        StorageError: no installed package serves the scheme of the URL, or it is the URL of a server, or clients take
            it for different places (`check_url`); or ``ACTSTORE_S3`` has another value.
        MissingExtraError: ``ACTSTORE_S3`` is ``obstore``, which is not installed.
    """
    if is_served(url):
        raise StorageError(
            f"{url} is a store of a server, which can only be read through actstore.open; give the URL of its storage"
        )
    scheme = scheme_of(url)
    if scheme in LOCAL:
        from actstore.storage.local import LocalBlobs

        return LocalBlobs(local_path(url, "the URL"))
    url = check_url(url)
    if scheme in S3:
        return _open_s3(url)
    from actstore.storage.fsspec_files import RemoteBlobs

    return RemoteBlobs(url)


def _open_s3(url: str) -> Blobs:
    chosen = os.environ.get("ACTSTORE_S3") or None
    if chosen not in (None, "s3fs", "obstore"):
        raise StorageError(f"ACTSTORE_S3 is {chosen!r}; expected 's3fs' or 'obstore', or leave it unset")
    is_installed = importlib.util.find_spec("obstore") is not None
    if chosen == "obstore" and not is_installed:
        raise MissingExtraError(
            "ACTSTORE_S3 is 'obstore', which is not installed; pip install 'actstore[s3-fast]', or unset it"
        )
    if chosen == "s3fs" or not is_installed:
        from actstore.storage.s3_fsspec import S3fsBlobs

        return S3fsBlobs(url)
    from actstore.storage.s3_obstore import ObjectBlobs

    return ObjectBlobs(url)
