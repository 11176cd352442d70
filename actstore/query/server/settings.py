"""Settings of a server, given when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from actstore.query.server.connections.room import ConnectionLimits

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable for the folder in which the processes of a server count for Prometheus."""


@dataclass(frozen=True)
class Settings:
    """Settings of a server; plain data, so that it can be sent to worker processes."""

    stores: dict[str, str] = field(default_factory=dict)
    """URL of each store by name."""
    root: str | None = None
    """Folder or bucket; every store below it is served, also those that come later."""
    allow_links: tuple[Path, ...] = ()
    """Folders that links in stores may lead into."""
    token_file: Path | None = None
    cache_dir: Path | None = None
    """Folder for shards of remote stores, shared by all processes."""
    cache_limit: int | None = None
    """Bytes of the cache at most."""
    max_reply: int = 4 << 30
    """Bytes of one reply at most."""
    max_request: int = 4 << 20
    """Bytes of the body of a request at most."""
    max_batch: int = 256 << 20
    """Bytes of one batch, of all ranks together, at most."""
    max_held: int = 1 << 30
    """Bytes of memory that a process holds for its clients at most: batches, what they are made from, and replies."""
    concurrency: int = 512
    """Requests at once in a process at most."""
    concurrency_per_client: int = 256
    """Requests at once with one token, or from one address, at most."""
    timeout_s: float = 60.0
    """Seconds until a reply begins at most."""
    stall_s: float = 30.0
    """Seconds that a reply waits for a client that takes none of it."""
    sign_s: int = 900
    """Seconds for which a presigned URL of a plan is valid."""
    connection_limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    """Limits on the connections of each process."""
    max_bodies: int = 64 << 20
    """Bytes of the bodies of requests that a process has in memory at once, at most."""
    allowed_hosts: tuple[str, ...] = ()
    """Names of the server, beside those of loopback, that requests may use when there are no tokens."""
    forwarded_allow_ips: str | None = None
    """Addresses and networks of proxies, or ``*``, whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are trusted."""
    access_log: Path | None = None
    """File to which one line of JSON is appended for each request; ``-`` is stderr."""
    scans: int = 2
    """Searches, and scans for rows that are not dropped, at once in a process."""
