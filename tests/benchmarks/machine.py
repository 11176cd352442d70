"""The machine of a table: its name, and the throughput of its processor, memory and disk."""

import mmap
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
import torch

from tests.benchmarks.measure import interleaved, timed

_NBYTES: Final = 512 << 20
_STEP: Final = 64 << 20
_SIZE: Final = 2048
"""Rows and columns of the matrices that are multiplied."""


def name() -> str:
    """A name that differs between machines with different figures."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{_cpu()}, {_bfloat16()}, {os.cpu_count()} cores, {device}"


def rates(folder: Path) -> str:
    """The throughput of the machine's parts, in a sentence.

    Args:
        folder: a folder on the disk that benchmarks write to.
    """
    path = folder / "machine"
    source, target = _memory(), _memory()
    matrices = {
        dtype: torch.ones(_SIZE, _SIZE, dtype=getattr(torch, dtype)) for dtype in ("float32", "bfloat16")
    }
    speeds = interleaved(
        {
            "memory": timed(lambda: _copied(source, target)),
            "written": timed(lambda: _written(path, source)),
            "read": timed(lambda: _read(path, target)),
            **{dtype: timed(_product(matrix)) for dtype, matrix in matrices.items()},
        }
    )
    path.unlink()
    gb, tera = 1e9, 1e12
    return (
        f"A copy of memory gives {speeds['memory'].median / gb:.1f} GB/s, the disk "
        f"{speeds['written'].median / gb:.1f} GB/s (written past the page cache, with fsync), a file in the page cache "
        f"{speeds['read'].median / gb:.1f} GB/s, matrix products {speeds['float32'].median / tera:.2f} (float32) and "
        f"{speeds['bfloat16'].median / tera:.2f} (bfloat16) TFLOP/s."
    )


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _bfloat16() -> str:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    for flag, arithmetic in (("amx_bf16", "AMX bfloat16"), ("avx512_bf16", "AVX-512 bfloat16")):
        if flag in flags:
            return arithmetic
    return "no bfloat16 arithmetic"


def _memory() -> memoryview:
    """Page-aligned memory, as direct writes need it, touched once."""
    memory = mmap.mmap(-1, _NBYTES)
    np.frombuffer(memory, np.uint8)[:] = 1
    return memoryview(memory)


def _copied(source: memoryview, target: memoryview) -> float:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
    return _NBYTES


def _written(path: Path, source: memoryview) -> float:
    flags = os.O_WRONLY | os.O_CREAT | getattr(os, "O_DIRECT", 0)
    descriptor = os.open(path, flags, 0o644)
    try:
        for start in range(0, _NBYTES, _STEP):
            if os.write(descriptor, source[start : start + _STEP]) != _STEP:
                raise RuntimeError("the disk took a part of what it was given")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return _NBYTES


def _read(path: Path, target: memoryview) -> float:
    with path.open("rb", buffering=0) as file:
        return sum(file.readinto(target[start : start + _STEP]) for start in range(0, _NBYTES, _STEP))


def _product(matrix: torch.Tensor) -> Callable[[], float]:
    def product() -> float:
        torch.mm(matrix, matrix)
        return 2.0 * _SIZE**3

    return product
