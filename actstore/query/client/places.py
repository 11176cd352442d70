"""Locations of objects as a server gives them, refused where a client must not go."""

import re
from typing import Final
from urllib.parse import urlsplit

from actstore.query.client.bounds import shown, unexpected
from actstore.query.client.server import Server
from actstore.query.client.unix import SCHEME, is_unix
from actstore.query.documents import FetchPlan, Place, PlanRequest
from actstore.query.loopback import is_link_local, is_loopback, leads_here

_STORAGE: Final = re.compile(r"(s3|gs|az)://[^/]")
"""Storage that is read with the credentials of this process: nothing of another kind, no chained URLs of fsspec."""
_NBYTES: Final = 1 << 20
_MAX_EXPIRES_S: Final = 7 * 24 * 3600
"""Seconds for which a URL of S3 is valid at most."""


def place_of(server: Server, key: str) -> tuple[Place, int]:
    """The location of an object, and for how many seconds it is valid.

    Raises:
        StorageError: the reply of the server is impossible, or names a location that no client reads for a server.
    """
    plan = server.document(FetchPlan, "/plan", request=PlanRequest(keys=[key]), most=_NBYTES)
    where = f"{server.url}/plan"
    if plan.arrays or plan.reads or [place.key for place in plan.places] != [key]:
        came = f"{len(plan.places)} places, {len(plan.arrays)} arrays and {len(plan.reads)} reads"
        raise unexpected(where, came, f"the place of {key}")
    expires_s = plan.expires_s or 0
    if not 0 <= expires_s <= _MAX_EXPIRES_S:
        raise unexpected(where, f"a URL for {shown(expires_s)} s", f"one for at most {_MAX_EXPIRES_S}")
    place = plan.places[0]
    if not _is_allowed(place, server.url):
        raise unexpected(
            where,
            f"the place {shown(place.url, 300)} of the kind {place.kind}",
            "s3://, gs:// or az://, https://, http:// of a server without TLS, or a path of a server on this machine",
        )
    return place, expires_s


def _is_allowed(place: Place, url: str) -> bool:
    if not place.url.isprintable() or "\\" in place.url or "::" in place.url.partition("?")[0]:
        return False
    if place.kind == "http":
        return _is_allowed_url(place.url, url)
    if not place.url.endswith(f"/{place.key}"):
        return False
    if place.kind == "file":
        # A path of another machine may be anything here.
        return place.url.startswith("/") and ".." not in place.url.split("/") and _is_here(url)
    return _STORAGE.match(place.url) is not None and not {"?", "#"} & set(place.url)


def _is_allowed_url(signed: str, url: str) -> bool:
    try:
        parts, ours = urlsplit(signed), urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    if parts.scheme != "https" and (parts.scheme != "http" or ours.scheme not in ("http", SCHEME)):
        return False
    if not parts.hostname or "@" in parts.netloc:
        return False
    # Services that trust whoever is on this machine, or say what its credentials are, are not for a server elsewhere.
    return _is_here(url) or not (leads_here(parts.hostname) or is_link_local(parts.hostname))


def _is_here(url: str) -> bool:
    """Whether a server runs on this machine."""
    return is_unix(url) or is_loopback(urlsplit(url).hostname or "")
