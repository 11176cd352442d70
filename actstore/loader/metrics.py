"""How a loader performs: whether the trainer waits for it, and what it reads."""

from dataclasses import dataclass

from actstore.loader.batches.batch import Batch, Values, tensors_of


@dataclass(frozen=True)
class Metrics:
    """Counts and times since the loader was made."""

    n_batches: int
    """Batches that were given out."""
    n_rows: int
    nbytes: int
    """Bytes of the values that were given out."""
    seconds_waiting: float
    """Seconds that the caller of `next` waited. If this grows as fast as time, the loader is too slow."""
    seconds_gathering: float
    """Seconds that making batches took, most of them while the caller was busy."""
    n_ready: int
    """Batches that wait to be taken now."""
    n_retries: int
    """Requests to storage that were repeated."""
    nbytes_read: int
    """Bytes of shards that were read by windows, from storage or the cache. Mapped files are read by the system, and do
    not count.
    """
    n_cache_hits: int
    """Reads of shards that were in ``cache_dir``."""
    n_cache_misses: int
    """Shards that had to be fetched first."""
    mask_nbytes: int
    """Bytes of memory of the bits that say which rows are kept."""


class Counts:
    """The counts of a loader while it gives out batches."""

    def __init__(self) -> None:
        self._n_batches = self._n_rows = self._nbytes = 0
        self._seconds_waiting = self._seconds_gathering = 0.0

    def add(self, batch: Values | Batch, seconds_gathering: float, seconds_waiting: float) -> None:
        """Count one more batch."""
        tensors = tensors_of(batch)
        self._n_batches += 1
        self._n_rows += tensors[0].shape[0]
        self._nbytes += sum(tensor.nbytes for tensor in tensors)
        self._seconds_gathering += seconds_gathering
        self._seconds_waiting += seconds_waiting

    def metrics(
        self,
        *,
        n_ready: int,
        n_retries: int,
        nbytes_read: int,
        cache_hits_and_misses: tuple[int, int],
        mask_nbytes: int,
    ) -> Metrics:
        """The metrics as of now."""
        n_hits, n_misses = cache_hits_and_misses
        return Metrics(
            n_batches=self._n_batches,
            n_rows=self._n_rows,
            nbytes=self._nbytes,
            seconds_waiting=self._seconds_waiting,
            seconds_gathering=self._seconds_gathering,
            n_ready=n_ready,
            n_retries=n_retries,
            nbytes_read=nbytes_read,
            n_cache_hits=n_hits,
            n_cache_misses=n_misses,
            mask_nbytes=mask_nbytes,
        )
