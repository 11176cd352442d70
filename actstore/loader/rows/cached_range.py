"""Shards that are fetched into the disk cache, and mapped from there."""

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
    """Map shards into one range of addresses; those that are not in the cache are fetched first.

    Args:
        cache: the cache of the storage that has the shards.
        places: the shards of an array that can be mapped.
        shards: the numbers of the shards to map, ascending.
        stop: once it is set, no further shard is fetched.
        n_requests: the most requests to the storage at once.

    Raises:
        NoRoomError: the shards, with what others use, exceed the limit of the cache.
        LoaderError: fetching was stopped.
        DiskFullError: the disk has no space for them.
        StorageError: a shard cannot be fetched, or is damaged.
    """

    def fetch(key: str) -> None:
        if stop.is_set():
            raise LoaderError(
                f"{cache.url}/{key} was not read: the loader was closed; request the batch again"
            )
        cache.fetch(key)

    keys = [places.key(shard) for shard in shards.tolist()]
    with cache.room_for(int(places.nbytes[shards].sum())):
        for _ in range(ATTEMPTS):
            with ThreadPoolExecutor(n_requests, thread_name_prefix="fetch") as threads:
                for _ in threads.map(fetch, keys):
                    pass
            with contextlib.suppress(BlobNotFoundError):  # removed since by a process that needed the room
                mapped = AddressRange(
                    cache.files,
                    places,
                    shards,
                    remedy="remove it, and make the loader again: it is fetched then",
                )
                cache.count(mapped)
                return mapped
    raise NoRoomError(
        f"{cache.files.url}: files are removed by others before they can be used, so cache_limit is less than what all "
        "that share this cache_dir use at once"
    )
