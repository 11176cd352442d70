"""Whether files that are mapped still end where they did."""

import mmap
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

_UNKNOWN: Final = -1


class FileEnds:
    """Of each file the last byte that is not zero, if it is in the last page: it is looked at after the rows were.

    Of a file that becomes shorter, the system takes all pages behind the new end, which is a signal when they are read,
    and the rest of the page that has it becomes zeros, which nobody is told. If the end is in an earlier page, the look
    at the last one is the signal. If it is in the last page itself, either the byte has become zero, or nothing but
    zeros was lost. So no row is taken for what it is not, whichever page it is in.

    For a batch of 4,096 rows, this takes 0.05 ms with 64 files and 0.2 ms with 20,000; to ask the system for their
    sizes takes 0.6 and 60 ms. Other bytes of the same size in their place are not noticed.
    """

    def __init__(self, memory: NDArray[np.uint8], n_files: int) -> None:
        """
        Args:
            memory: where all of them are mapped.
            n_files: how many there are at most.
        """
        self._memory = memory
        self._places = np.full(n_files, _UNKNOWN, np.int64)
        self._values = np.zeros(n_files, np.uint8)

    def check(
        self, files: NDArray[np.int64], extent: Callable[[int], tuple[int, int]], check: Callable[[int], None]
    ) -> int | None:
        """Look at some files, after their rows were read.

        Args:
            files: their numbers, some of them more than once.
            extent: where in the memory a file begins and ends; asked when it is looked at for the first time.
            check: raises if a file is not as long as it must be; called then, too.

        Returns:
            One that has become shorter. None if none has, or if there was a signal.
        """
        is_among = np.zeros(len(self._places), bool)
        is_among[files] = True
        among = np.flatnonzero(is_among)
        for file in among[self._places[among] == _UNKNOWN].tolist():
            start, end = extent(file)
            place = end - 1
            if not self._memory[place]:
                last_page = max(start, place // mmap.PAGESIZE * mmap.PAGESIZE)
                found = np.flatnonzero(self._memory[last_page:end])
                place = last_page + int(found[-1] if len(found) else 0)
            value = self._memory[place]
            # Afterwards: had it been cut before, then it would be short now.
            check(file)
            self._places[file], self._values[file] = place, value
        is_wrong = self._memory[self._places[among]] != self._values[among]
        return int(among[np.argmax(is_wrong)]) if is_wrong.any() else None
