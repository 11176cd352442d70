"""What a server is told when it starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable: a folder in which the processes of a server count for Prometheus."""


@dataclass(frozen=True)
class Settings:
    """All of it; plain data, so that worker processes can be given it."""

    stores: dict[str, str] = field(default_factory=dict)
    """URL by name."""
    root: str | None = None
    """Every store below is served, also those that come later."""
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
    """Bytes of batches that a process keeps in memory, for other clients or until they are sent."""
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
