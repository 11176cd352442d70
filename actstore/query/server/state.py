"""What the handlers of all requests share."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from fastapi import Request

from actstore.query.server.admission.access import Access, Scope
from actstore.query.server.admission.gate import SCOPE, STORE_ID, STORE_URL, STORE_VERSION
from actstore.query.server.catalog.catalog import Catalog, no_store
from actstore.query.server.memory.budget import MemoryBudget
from actstore.query.server.monitoring.access_log import AccessLog
from actstore.query.server.monitoring.metrics import Metrics
from actstore.query.server.readiness import Readiness
from actstore.query.server.settings import Settings
from actstore.query.server.sharing.known_rows import KnownRows
from actstore.query.server.sharing.scans import Scans
from actstore.query.server.sharing.shared_batches import SharedBatches
from actstore.store.committed_store import CommittedStore
from actstore.store.reading.identity import label_of


@dataclass(frozen=True)
class State:
    """Of one process."""

    settings: Settings
    catalog: Catalog
    batches: SharedBatches
    metrics: Metrics
    budget: MemoryBudget
    known_rows: KnownRows
    scans: Scans
    readiness: Readiness
    access: Access | None = None
    """The tokens; None lets everybody in."""
    log: AccessLog | None = None


def state_of(request: Request) -> State:
    """The state of the server that got a request."""
    found: State = request.app.state.actstore
    return found


def scope_of(request: Request) -> Scope:
    """What the client of a request may read."""
    found: Scope = request.scope[SCOPE]
    return found


def store_of(request: Request, name: str) -> CommittedStore:
    """A store that the client of a request may read.

    Raises:
        Problem: there is none of this name, for this client.
        StorageError: it cannot be read.
    """
    if not scope_of(request).allows(name):
        raise no_store(name)
    return _noted(request, state_of(request).catalog.store(name))


def store_at_hand(request: Request, name: str) -> CommittedStore | None:
    """The same if nothing has to be read for it; None also where there is none, for this client."""
    found = state_of(request).catalog.at_hand(name) if scope_of(request).allows(name) else None
    return None if found is None else _noted(request, found)


def _noted(request: Request, store: CommittedStore) -> CommittedStore:
    """Have the reply say which store it is of, and no error where that is."""
    request.scope[STORE_URL] = store.url
    request.scope[STORE_ID] = store_id(store)
    request.scope[STORE_VERSION] = _version(store)
    return store


@lru_cache(maxsize=256)
def store_id(store: CommittedStore) -> str:
    """Another one for another store, the same while one grows."""
    return hashlib.sha256(store.plan.to_bytes()).hexdigest()[:32]


@lru_cache(maxsize=256)
def _version(store: CommittedStore) -> str:
    """The store is the same object until there is more in it, or another one in its place."""
    return label_of(store.identity)
