"""What a plan says of the files of its source, so that no run goes on with others."""

from collections.abc import Sequence
from typing import Final

from actstore.store.format.plan import SourceFileIdentity
from actstore.store.format.shard import crc32c
from actstore.tokens import SourceFile
from actstore.tokens.failure import reading

MAX_CHECKED: Final = 256 << 20
"""Bytes of all files of a source, up to which their contents are compared."""
_CHUNK_NBYTES: Final = 4 << 20


def identities(files: Sequence[SourceFile]) -> tuple[SourceFileIdentity, ...]:
    """Name, size and checksum of each file.

    There are no checksums where the files are large together, or storage does not tell how large they are: reading all
    of a corpus only to see that nothing has changed could take longer than the run, and cost more.

    Raises:
        TokensError: a file cannot be read.
    """
    sizes = [file.nbytes for file in files if file.nbytes is not None and file.located is not None]
    is_checked = len(sizes) == len(files) and sum(sizes) <= MAX_CHECKED
    return tuple(
        SourceFileIdentity(
            name=file.url.rsplit("/", 1)[-1],
            nbytes=file.nbytes,
            crc32c=_checksum(file) if is_checked else None,
        )
        for file in files
    )


def _checksum(file: SourceFile) -> int:
    assert file.located is not None
    crc = 0
    with reading(file.url), file.located.open_stored() as stream:
        while chunk := stream.read(_CHUNK_NBYTES):
            crc = crc32c(chunk, crc)
    return crc


def are_same(stored: Sequence[SourceFileIdentity], asked: Sequence[SourceFileIdentity]) -> bool:
    """Whether these can be the same files: earlier versions wrote no checksums, and large sources have none."""
    return len(stored) == len(asked) and all(is_same(a, b) for a, b in zip(stored, asked, strict=True))


def is_same(stored: SourceFileIdentity, asked: SourceFileIdentity) -> bool:
    """Whether these can be the same file."""
    is_known = stored.crc32c is not None and asked.crc32c is not None
    return (stored.name, stored.nbytes) == (asked.name, asked.nbytes) and (
        not is_known or stored.crc32c == asked.crc32c
    )
