"""What the handlers of all requests share."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from fastapi import Request

from actstore.query.server.access import Scope
from actstore.query.server.batches import SharedBatches
from actstore.query.server.catalog import Catalog, no_store
from actstore.query.server.gate import STORE_ID, STORE_URL
from actstore.query.server.held import Held
from actstore.query.server.metrics import Metrics
from actstore.query.server.settings import Settings
from actstore.store.store import Store


@dataclass(frozen=True)
class State:
    """Of one process."""

    settings: Settings
    catalog: Catalog
    batches: SharedBatches
    metrics: Metrics
    held: Held


def state_of(request: Request) -> State:
    """The state of the server that got a request."""
    found: State = request.app.state.actstore
    return found


def scope_of(request: Request) -> Scope:
    """What the client of a request may read."""
    found: Scope = request.scope["actstore.scope"]
    return found


def store_of(request: Request, name: str) -> Store:
    """A store that the client of a request may read.

    Raises:
        Problem: there is none of this name, for this client.
        StorageError: it cannot be read.
    """
    if not scope_of(request).allows(name):
        raise no_store(name)
    found = state_of(request).catalog.store(name)
    request.scope[STORE_URL] = found.url
    request.scope[STORE_ID] = store_id(found)
    return found


@lru_cache(maxsize=256)
def store_id(store: Store) -> str:
    """Another one for another store, the same while one grows."""
    return hashlib.sha256(store.plan.to_bytes()).hexdigest()[:32]
