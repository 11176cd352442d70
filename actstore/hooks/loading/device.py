"""Devices by the names that users give."""

from typing import TYPE_CHECKING

from actstore.errors import ModelError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def usable_device(device: "str | torch.device") -> "torch.device":
    """The device of this name, which can hold values.

    Raises:
        ModelError: torch does not know the device, this machine does not have it, or it holds no values (meta).
    """
    import torch

    try:
        usable = torch.device(device)
        torch.empty(1, device=usable)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise ModelError(
            f"device {quoted(device)} is not known or not there; choose cpu, or cuda if there is a GPU"
        ) from error
    if usable.type == "meta":
        raise ModelError("device meta holds no values; choose cpu, or cuda if there is a GPU")
    return usable
