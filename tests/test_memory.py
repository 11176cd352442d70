"""The amount of memory, against what the system reports in another way."""

from pathlib import Path

import psutil
import pytest
import torch

from actstore import memory

CPU = torch.device("cpu")


def test_memory_of_this_machine() -> None:
    assert memory.total_nbytes() <= psutil.virtual_memory().total
    assert 0 < memory.free_nbytes(CPU) <= memory.total_nbytes()


def test_a_container_may_take_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    without = memory.total_nbytes()
    (tmp_path / "memory.max").write_text("1000000\n")
    # 700,000 bytes of files can be dropped.
    (tmp_path / "memory.stat").write_text("anon 200000\nfile 700000\nkernel 50000\nshmem 0\n")
    assert without > memory.total_nbytes() == 1_000_000
    assert memory.free_nbytes(CPU) == 750_000


def test_systems_that_do_not_say_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    monkeypatch.setattr(memory, "_fields", lambda _file: {})
    assert memory.free_nbytes(CPU) == memory.total_nbytes() // 2
