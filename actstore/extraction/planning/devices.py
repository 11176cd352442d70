"""Checking the device of a job before anything is loaded."""

import re
from typing import Final

from actstore.errors import JobError
from actstore.extraction.computing.executor import Resources, workers_here


def check_device(name: str | None, executor: str, resources: Resources) -> str | None:
    """Check the name of a device, and return it. Where workers run on this machine, it must have the device.

    Raises:
        JobError: torch does not know the device, or this machine does not have it; or there is no such executor.
    """
    n_workers = workers_here(executor, resources)
    if name is None:
        return None
    if not re.fullmatch(r"(cpu|cuda|mps|xpu)(:\d+)?", name):
        raise JobError(f"device {name!r} is not known; choose cpu, cuda, or one of several such as cuda:0")
    kind, _, number = name.partition(":")
    if executor == "ray" and kind == "cuda" and int(number or 0):
        raise JobError(
            f"device {name!r} was asked for, and Ray gives each worker a GPU of its own, which it sees as the only "
            "one; choose cuda"
        )
    if kind == "cpu" or n_workers is None:
        return name
    n_devices = _n_devices(kind)
    if not n_devices:
        raise JobError(
            f"device {name!r} was asked for, and torch finds no {_DEVICES[kind]} on this machine; choose cpu, or the "
            "ray executor and the address of a cluster that has it"
        )
    if int(number or 0) >= n_devices:
        raise JobError(
            f"device {name!r} was asked for, and this machine has {n_devices} of them, from {kind}:0 on; choose one "
            "of these"
        )
    if kind == "cuda" and n_workers > n_devices:
        raise JobError(
            f"{n_workers} workers with a GPU each were asked for, and this machine has {n_devices}; choose a smaller "
            "num_workers, or the address of a cluster that has them"
        )
    return name


_DEVICES: Final = {"cuda": "GPU", "mps": "GPU of Apple", "xpu": "GPU of Intel"}


def _n_devices(kind: str) -> int:
    import torch

    if kind == "cuda":
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return torch.xpu.device_count() if torch.xpu.is_available() else 0
