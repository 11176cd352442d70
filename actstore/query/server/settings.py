"""Settings of a server, given when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

from actstore.query.server.connections.room import ConnectionLimits

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable for the folder in which the processes of a server count for Prometheus."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server; plain data, so that it can be sent to worker processes.

    A text in a type is what ``actstore serve --help`` says of the option.
    """

    stores: dict[str, str] = field(default_factory=dict)
    """URL of each store by name."""
    root: Annotated[str | None, "Folder or bucket: every store below it is served, including later ones."] = (
        None
    )
    allow_links: Annotated[
        tuple[Path, ...],
        "Links in stores may also lead into this folder. Default: only within the folder of the store.",
    ] = ()
    token_file: Annotated[
        Path | None,
        "File with one token per line, then name=WHOSE and globs of its stores. Needed beyond loopback; reread while "
        "the server runs.",
    ] = None
    cache_dir: Path | None = None
    """Folder for shards of remote stores, shared by all processes."""
    cache_limit: int | None = None
    """Bytes of the cache at most."""
    max_reply: Annotated[int, "Most bytes of one reply."] = 4 << 30
    max_request: int = 4 << 20
    """Bytes of the body of a request at most."""
    max_batch: Annotated[int, "Most bytes of one batch, all ranks together; a few batches are kept."] = (
        256 << 20
    )
    max_held: Annotated[
        int,
        "Most bytes that a process may hold for clients: batches, windows, replies. One client gets at most half.",
    ] = 1 << 30
    concurrency: Annotated[int, "Most requests at once in a process."] = 512
    concurrency_per_client: int = 256
    """Requests at once with one token, or from one address, at most."""
    timeout_s: Annotated[float, "Seconds until a reply must begin."] = 60.0
    stall_s: Annotated[float, "Seconds after which a client that reads nothing of its reply is cut off."] = (
        30.0
    )
    sign_s: int = 900
    """Seconds for which a presigned URL of a plan is valid."""
    connection_limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    """Limits on the connections of each process."""
    max_bodies: int = 64 << 20
    """Bytes of the bodies of requests that a process has in memory at once, at most."""
    allowed_hosts: Annotated[
        tuple[str, ...],
        "Another name or address by which clients may reach a server without tokens; can be repeated.",
    ] = ()
    forwarded_allow_ips: Annotated[
        str | None,
        "Addresses and networks of proxies, joined by commas: the client is the last address of X-Forwarded-For that "
        "is none of them. * alone is one proxy, at whatever address. Default: no proxy is trusted.",
    ] = None
    access_log: Annotated[
        Path | None, "Append a line of JSON for each request to this file; - is stderr."
    ] = None
    compute: Annotated[
        str | None,
        "Compute activations of prompts that a served store lacks, with this model (Hub name or folder), and add them "
        "to the store. Default: the server only reads.",
    ] = None
    compute_tokens: Annotated[int, "Most tokens of the prompts of one request to compute."] = 16_384
    compute_pending: Annotated[
        int, "Most requests to compute that wait; a quarter of them, and at least two, of one client."
    ] = 16
    compute_limit: Annotated[int, "Most bytes that a store may grow to by computing."] = 64 << 30
    scans: Annotated[
        int, "Most scans at once in a process: searches, and finding the rows that are not dropped."
    ] = 2
