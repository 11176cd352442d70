"""State that the handlers of all requests share."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from fastapi import Request

from actstore.query.server.admission.access import Access, Scope
from actstore.query.server.admission.gate import SCOPE, STORE_ID, STORE_URL, STORE_VERSION
from actstore.query.server.catalog.catalog import Catalog, no_store
from actstore.query.server.computing.model_process import ModelProcess
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
    """State of one process."""

    settings: Settings
    catalog: Catalog
    batches: SharedBatches
    metrics: Metrics
    budget: MemoryBudget
    known_rows: KnownRows
    scans: Scans
    readiness: Readiness
    computing: tuple[ModelProcess, Scans] | None = None
    """The model and the queue before it; None if the server only reads."""
    access: Access | None = None
    """The tokens; None lets everybody in."""
    log: AccessLog | None = None


def state_of(request: Request) -> State:
    """The state of the server that got a request."""
    state: State = request.app.state.actstore
    return state


def scope_of(request: Request) -> Scope:
    """The stores that the client of a request may read."""
    scope: Scope = request.scope[SCOPE]
    return scope


def store_of(request: Request, name: str) -> CommittedStore:
    """A store that the client of a request may read.

    Raises:
        Problem: there is no such store for this client.
        StorageError: the store cannot be read.
    """
    if not scope_of(request).allows(name):
        raise no_store(name)
    return _note_store(request, state_of(request).catalog.store(name))


def cached_store(request: Request, name: str) -> CommittedStore | None:
    """The store if it is open and needs no reading; None also where there is no such store for this client."""
    store = state_of(request).catalog.cached(name) if scope_of(request).allows(name) else None
    return None if store is None else _note_store(request, store)


def _note_store(request: Request, store: CommittedStore) -> CommittedStore:
    """Have the reply name the store in its headers, and keep the store's URL out of error messages."""
    request.scope[STORE_URL] = store.url
    request.scope[STORE_ID] = store_id(store)
    request.scope[STORE_VERSION] = _version(store)
    return store


@lru_cache(maxsize=256)
def store_id(store: CommittedStore) -> str:
    """Identifies a store, and stays the same while the store grows."""
    return hashlib.sha256(store.plan.to_bytes()).hexdigest()[:32]


@lru_cache(maxsize=256)
def _version(store: CommittedStore) -> str:
    """Label of the contents. There is a new store object when the store grows or is replaced."""
    return label_of(store.identity)
