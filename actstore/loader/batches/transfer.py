"""Copying batches from host memory to a device."""

from typing import TYPE_CHECKING

from actstore.errors import LoaderError
from actstore.reason import reason

if TYPE_CHECKING:
    import torch


class Transfer:
    """Copies rows to a device. For a GPU they go through pinned memory on a stream of their own, so that neither they
    nor the GPU's other work wait for each other.
    """

    def __init__(self, device: "torch.device") -> None:
        """
        Raises:
            LoaderError: torch has no such device here.
        """
        import torch

        check_device(device)
        self._device = device
        self.is_pinned = device.type == "cuda"
        """Whether rows should be in pinned memory: a copy from any other memory makes the CPU wait for the GPU."""
        self._stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(device) if self.is_pinned else None  # type: ignore[no-untyped-call]
        )

    def __call__(self, rows: "torch.Tensor", dtype: "torch.dtype") -> "torch.Tensor":
        """Copy rows to the device. When this returns, the copy can be used on any stream and the host memory can be
        reused.

        Args:
            rows: rows in host memory; they travel in their stored type, and are converted on the device.
            dtype: the type of the copy.
        """
        if self._stream is None:
            return rows.to(self._device).to(dtype)
        import torch

        with torch.cuda.stream(self._stream):
            copied = rows.to(self._device, non_blocking=True).to(dtype)
        self._stream.synchronize()
        return copied

    def hand_over(self, rows: "torch.Tensor") -> None:
        """Called by the thread that is about to use a copy. The copy's memory belongs to the stream of the copies,
        which would reuse it as soon as nobody holds it, even if the GPU has not finished what the thread started with
        it.
        """
        if rows.is_cuda:
            import torch

            rows.record_stream(torch.cuda.current_stream(rows.device))


def check_device(device: "torch.device | str") -> None:
    """Check that torch can use a device.

    Raises:
        LoaderError: torch has no such device here.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = reason(error).split(". ")[0]  # the rest is for torch's developers
        raise LoaderError(
            f"device is {str(device)!r}, and torch {torch.__version__} cannot use it here: {first}; leave device out "
            "for host memory"
        ) from error
