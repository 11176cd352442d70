"""Inner chunks as Blosc 1 frames, the data of the Zarr v3 codec ``blosc``, with the two settings that stores use.

Frames are made by one thread. With more threads, Blosc orders blocks by when they are finished, and equal chunks would
not give equal bytes.
"""

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from actstore.errors import JobError, StorageError
from actstore.reason import reason

Compression = Literal["lz4", "zstd"]
"""``lz4`` with a bit shuffle is fast; ``zstd`` with a byte shuffle is slower."""


@dataclass(frozen=True)
class _Setting:
    level: int
    shuffle: int
    shuffle_name: str


_SETTINGS: Final[dict[Compression, _Setting]] = {
    "lz4": _Setting(level=5, shuffle=2, shuffle_name="bitshuffle"),
    "zstd": _Setting(level=1, shuffle=1, shuffle_name="shuffle"),
}
_HEADER: Final = struct.Struct("<BBBBIII")
"""Header of a frame: version of the frame, version of the codec, flags, bytes of an element, bytes of the data, bytes
of a block, bytes of the frame. Source: https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst
"""
_VERSION: Final = 2
_CODECS: Final = {1: "lz4", 4: "zstd"}
"""Codecs by the upper three bits of the flags. Frames of other codecs are refused, so that no other decoder gets input.
"""
OVERHEAD: Final = _HEADER.size
"""The most bytes by which a frame is longer than its data: Blosc stores what it cannot compress."""
MAX_NBYTES: Final = 2**31 - 1 - OVERHEAD
"""The most bytes of data that one frame can hold."""


def check_chunk(nbytes: int) -> None:
    """Check that a frame can hold a chunk of this size.

    Raises:
        JobError: it cannot.
    """
    if nbytes > MAX_NBYTES:
        raise JobError(
            f"one sequence of {nbytes:,} bytes is too much for a compressed chunk, which holds {MAX_NBYTES:,}; "
            "leave compression out, or choose a shorter context"
        )


def codec(compression: Compression, itemsize: int) -> dict[str, Any]:
    """The entry of the codec in a ``zarr.json``."""
    setting = _SETTINGS[compression]
    return {
        "name": "blosc",
        "configuration": {
            "cname": compression,
            "clevel": setting.level,
            "shuffle": setting.shuffle_name,
            "typesize": itemsize,
            "blocksize": 0,
        },
    }


def compress(compression: Compression, itemsize: int, chunk: NDArray[np.uint8]) -> bytes:
    """Make a frame; equal chunks give equal bytes, whatever else the process does."""
    setting = _SETTINGS[compression]
    with _one_thread() as blosc:
        frame: bytes = blosc.compress(
            chunk, compression.encode(), setting.level, setting.shuffle, blosc.AUTOBLOCKS, itemsize
        )
    return frame


def decompress(frame: NDArray[np.uint8], itemsize: int, out: NDArray[np.uint8], where: str) -> None:
    """Decompress a frame into ``out``. Nothing that the frame says decides how much memory is taken.

    Args:
        frame: the bytes as they were read; they may be damaged.
        itemsize: the bytes of an element.
        out: contiguous memory, as long as the chunk.
        where: the name of the frame in an error.

    Raises:
        StorageError: this is no frame of such a chunk. Not all damage is detected: LZ4 has no checksum.
    """
    if len(frame) < _HEADER.size:
        raise StorageError(
            f"{where} is damaged: {len(frame)} bytes are less than the header of a Blosc frame"
        )
    version, _, flags, width, nbytes, _, frame_nbytes = _HEADER.unpack(frame[: _HEADER.size].tobytes())
    # Blosc learns the lengths of frame and chunk only from these fields.
    header = (version, width, nbytes, frame_nbytes)
    expected = (_VERSION, itemsize, out.nbytes, frame.nbytes)
    if header != expected:
        raise StorageError(
            f"{where} is damaged: its header says (version, item size, bytes, bytes compressed) = {header} "
            f"where {expected} is expected"
        )
    if flags >> 5 not in _CODECS:
        raise StorageError(
            f"{where} is damaged: Blosc codec {flags >> 5} where lz4 (1) or zstd (4) is expected"
        )
    try:
        with _one_thread() as blosc:
            blosc.decompress(frame, out)
    except (RuntimeError, ValueError) as error:
        raise StorageError(f"{where} is damaged: Blosc cannot decompress it ({reason(error)})") from error


_lock = threading.Lock()
_n_inside = 0
_outside: bool | None = None


@contextmanager
def _one_thread() -> Iterator[Any]:
    """Get ``numcodecs.blosc``, set to use one thread; by default it uses several in the main thread.

    The setting is global to the process; the last user restores it. Other users of Blosc run with one thread meanwhile,
    which changes no value.
    """
    # Imported late: it takes a tenth of a second, and few stores are compressed.
    from numcodecs import blosc  # type: ignore[import-untyped]

    global _n_inside, _outside
    with _lock:
        if _n_inside == 0:
            _outside, blosc.use_threads = blosc.use_threads, False
        _n_inside += 1
    try:
        yield blosc
    finally:
        with _lock:
            _n_inside -= 1
            if _n_inside == 0:
                blosc.use_threads = _outside
