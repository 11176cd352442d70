"""The HTTP session with which zarr-python, through fsspec, reads from a server."""

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from actstore.errors import StorageError
from actstore.query.client.bounds import shown

if TYPE_CHECKING:
    import aiohttp


async def client_without_redirects(**options: Any) -> "aiohttp.ClientSession":
    """A session for fsspec that follows no redirects: a server must not get the token sent elsewhere, nor reach what
    only this machine can reach.
    """
    import aiohttp

    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(_refuse)
    return aiohttp.ClientSession(trace_configs=[tracing], **options)


async def _refuse(
    _session: "aiohttp.ClientSession",
    _context: SimpleNamespace,
    redirect: "aiohttp.TraceRequestRedirectParams",
) -> None:
    place = shown(redirect.response.headers.get("Location", ""), 300)
    raise StorageError(
        f"{redirect.url} redirects to {place}, and redirects are not followed; open the store where it is"
    )
