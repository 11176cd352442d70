"""What a server is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from actstore.query.server.connections.room import ConnectionLimits

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable: a folder in which the processes of a server count for Prometheus."""


@dataclass(frozen=True)
class Settings:
    """All of it; plain data, so that worker processes can be given it."""

    stores: dict[str, str] = field(default_factory=dict)
    """URL by name."""
    root: str | None = None
    """Every store below is served, also those that come later."""
    allow_links: tuple[Path, ...] = ()
    """Folders that links in stores may lead into."""
    token_file: Path | None = None
    cache_dir: Path | None = None
    """For shards of remote stores, shared by all processes."""
    cache_limit: int | None = None
    """Bytes of it."""
    max_reply: int = 4 << 30
    """Bytes of one reply."""
    max_request: int = 4 << 20
    """Bytes of the body of a request."""
    max_batch: int = 256 << 20
    """Bytes of one batch, of all ranks together."""
    max_held: int = 1 << 30
    """Bytes of memory that a process holds for its clients: batches, what they are made from, and replies."""
    concurrency: int = 512
    """Requests at once in a process."""
    concurrency_per_client: int = 256
    """Of them, those with one token, or from one address."""
    timeout_s: float = 60.0
    """Until a reply begins."""
    stall_s: float = 30.0
    """Without a client taking any of it."""
    sign_s: int = 900
    """How long a presigned URL of a plan is good for."""
    connection_limits: ConnectionLimits = field(default_factory=ConnectionLimits)
    """Of each process."""
    max_bodies: int = 64 << 20
    """Bytes of the bodies of requests that a process has in memory at once."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that a server without tokens may be called by, beside those of loopback."""
    forwarded_allow_ips: str | None = None
    """Addresses and networks of proxies, or ``*``, whose ``X-Forwarded-For`` and ``X-Forwarded-Proto`` are believed."""
    access_log: Path | None = None
    """One line of JSON for each request is appended to it; ``-`` is stderr."""
    scans: int = 2
    """Searches, and looks for rows that are not dropped, at once in a process."""
