"""Opens a store wherever it is: in storage, or on a server."""

import os

from actstore.errors import StorageError
from actstore.facade import Store
from actstore.storage.opening import open_blobs
from actstore.storage.urls import is_served
from actstore.store.committed_store import Check


def open_store(
    url: str | os.PathLike[str],
    *,
    token: str | None = None,
    direct: bool | None = None,
    check: Check | None = None,
) -> Store:
    """Open the store below a path or URL; exported as `actstore.open`.

    Args:
        url: a folder, ``s3://bucket/run``, any fsspec URL, or ``http://host:port/v1/stores/name`` of a server.
        token: token for a server. The environment variable ACTSTORE_TOKEN is used where none is given.
        direct: whether to read the storage behind a server without the server. None does so for loaders, if that
            storage can be reached; True for everything; False for nothing.
        check: ``first-use`` compares the checksum of every shard when it is first used, which reads all of the shard.
            The environment variable ACTSTORE_CHECK is used where none is given. None compares only the shards that are
            read as a whole from remote storage.

    Raises:
        StorageError: there is no store, or it cannot be read; or an option is not for this kind of URL.
    """
    if is_served(str(url)):
        from actstore.query.client.served_store import ServedStore

        if check is not None:
            raise StorageError(
                f"{url} is a server, which checks what it reads; set ACTSTORE_CHECK where it runs, and leave check out"
            )
        return ServedStore(str(url), token, direct)
    if token is not None or direct is not None:
        raise StorageError(
            f"{url} is no server, and token and direct are for one (http://host:port/v1/stores/name); leave them out"
        )
    return Store.in_storage(open_blobs(str(url)), check)
