"""Batches on their way from host memory to a device."""

import torch

from actstore.errors import LoaderError
from actstore.reason import reason


class Transfer:
    """Copies rows to a device. To a GPU they go from pinned memory, on a stream of their own: what the GPU is busy with
    does not wait for them, and they do not wait for it.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Raises:
            LoaderError: torch has no such device here.
        """
        check_device(device)
        self._device = device
        self.is_pinned = device.type == "cuda"
        """Whether rows should be in pinned memory, since copies from any other make the CPU wait for the GPU."""
        self._stream: torch.cuda.Stream | None = (
            torch.cuda.Stream(device) if self.is_pinned else None  # type: ignore[no-untyped-call]
        )

    def __call__(self, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A copy of the rows that is there, whatever stream it is used on, and the host memory free.

        Args:
            rows: on the CPU; they travel in their own type, and are converted where they arrive.
            dtype: wanted.
        """
        if self._stream is None:
            return rows.to(self._device).to(dtype)
        with torch.cuda.stream(self._stream):
            found = rows.to(self._device, non_blocking=True).to(dtype)
        self._stream.synchronize()
        return found

    def hand_over(self, rows: torch.Tensor) -> None:
        """Told by the thread that will use a copy. Its memory belongs to the stream of the copies, which would use it
        again as soon as nobody holds it, although what the thread had the GPU do with it may not be done.
        """
        if rows.is_cuda:
            rows.record_stream(torch.cuda.current_stream(rows.device))


def check_device(device: torch.device | str) -> None:
    """
    Raises:
        LoaderError: torch has no such device here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = reason(error).split(". ")[0]  # more is for torch's developers
        raise LoaderError(
            f"device is {str(device)!r}, and torch {torch.__version__} cannot use it here: {first}; leave device out "
            "for host memory"
        ) from error
