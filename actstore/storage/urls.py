"""Checks URLs of storage, so that every client takes them for the same place, now and later."""

import os
import re
from pathlib import Path
from typing import Final

from actstore.errors import StorageError

_SCHEME: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+)(?:::.*?)?://")
"""Matches the scheme of a URL; the first one of a chained URL, such as ``simplecache::s3://bucket/a``."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
_HALF_A_SCHEME: Final = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
LOCAL: Final = ("file", "local")
S3: Final = ("s3", "s3a")


def scheme_of(url: str) -> str:
    """The scheme of a URL, such as ``s3`` for ``s3://bucket/a``; ``file`` for a path."""
    match = _SCHEME.match(url)
    return match[1].lower() if match else "file"


def is_served(url: str) -> bool:
    """Whether a URL is that of a store on a server, which ``actstore serve`` runs."""
    return url.startswith(("http://", "https://", "http+unix://")) and "/v1/stores" in url


def local_path(url: str | os.PathLike[str], what: str = "the path") -> Path:
    """The absolute path that a user means by a path or ``file://`` URL; ``what`` begins the sentence if it is none.

    Raises:
        StorageError: the path is empty, has a control character or another scheme, or begins with the ``~`` of a user
            who does not exist.
    """
    text = os.fspath(url)
    _check_text(text, what)
    if scheme_of(text) not in LOCAL:
        raise StorageError(f"{what} is {text}, and must be a folder or file of this machine; give a path")
    bare = _SCHEME.sub("", text)
    try:
        return Path(bare).expanduser().absolute()
    except RuntimeError as error:
        raise StorageError(
            f"{what} is {text}, and there is no such user; write ./{bare} for that name"
        ) from error


def check_url(url: str) -> str:
    """Return the URL without slashes at its end, if all clients take it for the same place.

    Raises:
        StorageError: clients differ on it, since it has parts that are empty, ``.`` or ``..``, backslashes, control
            characters or no bucket; or it names no place, or is half a URL, such as ``s3:/bucket``.
    """
    _check_text(url, "the URL")
    scheme = scheme_of(url)
    if scheme in LOCAL:
        local_path(url, "the URL")
        return url
    if not url.startswith(scheme):
        raise StorageError(f"{url} has a scheme in capitals; write {scheme}://{_SCHEME.sub('', url)}")
    if not _SCHEME.sub("", url).strip("/"):
        raise StorageError(
            f"{url} names no place; expected {scheme}:// and a place, such as s3://bucket/prefix"
        )
    for link in url.split("::"):
        _check_parts(link, url)
    return url.rstrip("/")


def _check_parts(link: str, url: str) -> None:
    """Check one link of a chained URL, such as ``simplecache::s3://bucket/a``; the first may be a name alone."""
    scheme, _, rest = link.partition("://")
    authority, _, path = rest.partition("/")
    if scheme in S3 and not _BUCKET.fullmatch(authority):
        # What looks like a name and a password is not repeated.
        shown = "credentials" if "@" in authority else repr(authority)
        raise StorageError(
            f"a URL with {shown} in the place of its bucket cannot be used; expected s3://bucket/prefix, and "
            "credentials in the environment"
        )
    if scheme in S3 and "?versionId=" in path:
        raise StorageError(
            f"{url} names one version of an object, and a store is many objects; leave out ?versionId="
        )
    odd = next((part for part in path.rstrip("/").split("/") if part in ("", ".", "..")), None)
    if path.rstrip("/") and odd is not None:
        raise StorageError(
            f"{url} has {f'the part {odd!r}' if odd else 'two slashes in a row'}, which clients of storage understand "
            "in different ways; write it without"
        )


def _check_text(url: str, what: str) -> None:
    if not url.strip():
        raise StorageError(f"{what} is empty; give a path, s3://bucket/prefix or any fsspec URL")
    if _CONTROL.search(url) or not _is_utf8(url):
        raise StorageError(
            f"{what} is {url!r}, which has a character that names cannot have; choose another name"
        )
    if "\\" in url:
        raise StorageError(
            f"{what} is {url}, and a backslash is a slash for some clients of storage and a letter for others; use "
            "slashes"
        )
    if half := _HALF_A_SCHEME.match(url):
        raise StorageError(
            f"{what} is {url}, which is neither a URL nor looks like a path; write {half[1]}:// for a URL, or ./{url} "
            "for a folder of that name"
        )


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
