"""Blosc frames are reproducible, and no damaged frame can take memory or crash the process."""

import struct
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
from numcodecs import blosc  # type: ignore[import-untyped]
from numpy.typing import NDArray

from actstore.errors import JobError, StorageError
from actstore.store.format.compression import MAX_NBYTES, OVERHEAD, Compression, compress, decompress
from actstore.store.format.layout import ArrayLayout

BOTH: tuple[Compression, ...] = ("lz4", "zstd")
EACH = pytest.mark.parametrize("compression", BOTH)


def chunk(kind: str, nbytes: int = 1 << 20) -> NDArray[np.uint8]:
    rng = np.random.default_rng(0)
    if kind == "random":
        return rng.integers(0, 256, nbytes, dtype=np.uint8)
    if kind == "zeros":
        return np.zeros(nbytes, np.uint8)
    return rng.standard_normal(nbytes // 4, dtype=np.float32).astype(np.float16).repeat(2).view(np.uint8)


def frame_of(compression: Compression, values: NDArray[np.uint8], itemsize: int = 2) -> NDArray[np.uint8]:
    return np.frombuffer(compress(compression, itemsize, values), np.uint8)


@EACH
@pytest.mark.parametrize("kind", ["random", "zeros", "halves"])
@pytest.mark.parametrize("nbytes", [8, 200, 4096, 1 << 20])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_what_goes_in_comes_out(compression: Compression, kind: str, nbytes: int, itemsize: int) -> None:
    values = chunk(kind, nbytes)
    frame = frame_of(compression, values, itemsize)
    assert len(frame) <= nbytes + OVERHEAD
    out = np.empty(nbytes, np.uint8)
    decompress(frame, itemsize, out, "a")
    assert np.array_equal(out, values)


def test_numbers_are_bloscs() -> None:
    assert (MAX_NBYTES, OVERHEAD) == (blosc.MAX_BUFFERSIZE, blosc.MAX_OVERHEAD)
    zstd = blosc.compress(chunk("halves"), b"zstd", 1, blosc.SHUFFLE, 0, 2)
    lz4 = blosc.compress(chunk("halves"), b"lz4", 5, blosc.BITSHUFFLE, 0, 2)
    assert {len(compress("zstd", 2, chunk("halves"))), len(compress("lz4", 2, chunk("halves")))} == {
        len(zstd),
        len(lz4),
    }


@EACH
@pytest.mark.parametrize("use_threads", [None, True, False])
def test_equal_chunks_are_equal_bytes(compression: Compression, use_threads: bool | None) -> None:
    values = chunk("halves", 4 << 20)
    frames: set[bytes] = set()

    def work() -> None:
        frames.update(compress(compression, 2, values) for _ in range(4))

    before = blosc.use_threads
    blosc.use_threads = use_threads
    try:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        work()
        for thread in threads:
            thread.join()
        assert blosc.use_threads is use_threads
    finally:
        blosc.use_threads = before
    assert len(frames) == 1


def test_switch_is_set_back_after_an_error() -> None:
    before = blosc.use_threads
    frame = frame_of("lz4", chunk("halves")).copy()
    frame[16:200] = 0xFF
    with pytest.raises(StorageError, match="Blosc cannot decompress it"):
        decompress(frame, 2, np.empty(1 << 20, np.uint8), "a")
    assert blosc.use_threads is before


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        pytest.param(0, b"\x09", "its header says", id="version"),
        pytest.param(2, b"\x0c", "Blosc codec 0 where lz4", id="another codec"),
        pytest.param(3, b"\x04", "its header says", id="item size"),
        pytest.param(4, struct.pack("<I", 2**31 - 17), "its header says", id="far too large"),
        pytest.param(4, struct.pack("<I", 100), "its header says", id="too small"),
        pytest.param(8, struct.pack("<I", 2**31 - 17), "Blosc cannot decompress it", id="huge blocks"),
        pytest.param(8, struct.pack("<I", 0), "Blosc cannot decompress it", id="no blocks"),
        pytest.param(12, struct.pack("<I", 2**31), "its header says", id="longer than it is"),
    ],
)
def test_header_is_not_believed(at: int, value: bytes, words: str) -> None:
    frame = frame_of("lz4", chunk("halves")).copy()
    frame[at : at + len(value)] = np.frombuffer(value, np.uint8)
    with pytest.raises(StorageError, match=f"^acts/h .*is damaged: .*{words}"):
        decompress(frame, 2, np.empty(1 << 20, np.uint8), "acts/h (inner chunk 3)")


@pytest.mark.parametrize("n_bytes", [0, 1, 15, 16, 17, 100])
def test_cut_frame_is_damaged(n_bytes: int) -> None:
    frame = frame_of("zstd", chunk("halves"))
    with pytest.raises(StorageError, match="is damaged"):
        decompress(frame[:n_bytes], 2, np.empty(1 << 20, np.uint8), "a")


# In a process of its own, which must survive. Its memory is limited, and freed memory is overwritten.
HOSTILE = """
import resource, sys
import numpy as np
from actstore.errors import StorageError
from actstore.store.format.compression import compress, decompress

compress("lz4", 2, np.zeros(64, np.uint8))
rng = np.random.default_rng(0)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
n_refused = 0
for nbytes in (64, 5000, 1 << 20):
    values = np.cumsum(rng.integers(0, 3, nbytes // 2)).astype("<u2").view(np.uint8)
    frame = np.frombuffer(compress(sys.argv[1], 2, values), np.uint8)
    out = np.empty(nbytes, np.uint8)
    for turn in range(300):
        bad = frame.copy()
        # Every other time near the front, where offsets of blocks and lengths of streams are.
        n_bytes = min(len(frame), 100) if turn % 2 else len(frame)
        for bit in rng.integers(0, 8 * n_bytes, 1 + turn % 3):
            bad[bit // 8] ^= 1 << (bit % 8)
        if turn % 5 == 0:
            bad = bad[: rng.integers(1, len(bad))].copy()
            bad[12:16] = np.frombuffer(np.uint32(len(bad)).tobytes(), np.uint8)[: len(bad[12:16])]
        try:
            decompress(bad, 2, out, "a")
        except StorageError:
            n_refused += 1
print(n_refused)
"""


@EACH
def test_no_damage_ends_the_process(compression: Compression) -> None:
    environment = {"MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", HOSTILE, compression]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    # Damage that is neither refused nor noticed is left to the checksum of the shard.
    assert 300 < int(done.stdout) < 900


def test_metadata_names_the_codec() -> None:
    layout = ArrayLayout("a", (5, 4), "bfloat16", ("sequence", "position"), 4, 2, "lz4")
    settings: Any = layout.metadata()["codecs"][0]["configuration"]["codecs"]
    assert settings == [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {
            "name": "blosc",
            "configuration": {
                "cname": "lz4",
                "clevel": 5,
                "shuffle": "bitshuffle",
                "typesize": 2,
                "blocksize": 0,
            },
        },
    ]


def test_chunks_beyond_blosc_are_refused() -> None:
    with pytest.raises(JobError, match="too much for a compressed chunk"):
        ArrayLayout("a", (5, 1 << 30), "bfloat16", ("sequence", "position"), 4, 2, "lz4")
    assert ArrayLayout("a", (5, 1 << 30), "bfloat16", ("sequence", "position"), 4, 2).n_shards == 2
