"""Shards of a cache on a local disk, fetched and mapped."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from actstore.errors import LoaderError
from actstore.loader.cache.disk_cache import ATTEMPTS, DiskCache, NoRoomError
from actstore.loader.rows.address_range import AddressRange
from actstore.loader.rows.shard_places import ShardPlaces
from actstore.storage.errors import BlobNotFoundError


def cached_range(
    cache: DiskCache, places: ShardPlaces, shards: NDArray[np.int64], stop: threading.Event, n_requests: int
) -> AddressRange:
    """Shards as one range of addresses, fetched where they are not in the cache.

    Args:
        cache: of the storage that has them.
        places: of an array that can be mapped.
        shards: numbers of those that are wanted, ascending.
        stop: once it is set, no further shard is fetched.
        n_requests: the most to the storage at once.

    Raises:
        NoRoomError: the cache may not hold so much at once, or what others use beside it.
        LoaderError: it was stopped.
        DiskFullError: there is no space for them.
        StorageError: a shard cannot be fetched, or is damaged.
    """

    def fetch(key: str) -> None:
        if stop.is_set():
            raise LoaderError(
                f"{cache.url}/{key} was not read: the loader was closed; ask for the batch again"
            )
        cache.fetch(key)

    keys = [places.key(shard) for shard in shards.tolist()]
    with cache.room_for(int(places.nbytes[shards].sum())):
        for _ in range(ATTEMPTS):
            with ThreadPoolExecutor(n_requests, thread_name_prefix="fetch") as threads:
                for _ in threads.map(fetch, keys):
                    pass
            with contextlib.suppress(BlobNotFoundError):  # removed since, by a process that needed the room
                found = AddressRange(
                    cache.files,
                    places,
                    shards,
                    remedy="remove it, and make the loader again: it is fetched then",
                )
                cache.count(found)
                return found
    raise NoRoomError(
        f"{cache.files.url}: files are removed by others before they can be used, so cache_limit is less than what all "
        "that share this cache_dir use at once"
    )
