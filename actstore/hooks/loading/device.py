"""Where values are kept, as users say it."""

from typing import TYPE_CHECKING

from actstore.errors import ModelError
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch


def usable_device(device: "str | torch.device") -> "torch.device":
    """A device that can hold values.

    Raises:
        ModelError: torch does not know it, or it is not there.
    """
    import torch

    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        raise ModelError(
            f"device {quoted(device)} is not known or not there; choose cpu, or cuda if there is a GPU"
        ) from error
    if found.type == "meta":
        raise ModelError("device meta holds no values; choose cpu, or cuda if there is a GPU")
    return found
