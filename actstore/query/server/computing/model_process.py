"""The process that holds the model of a server. The server itself never computes with it: a forward would take the
interpreter from its event loop, and a forward that runs out of memory would end it.
"""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING, Any, Final

from actstore.query.problem import LATER, Problem
from actstore.recall.answers import Limits, StoredPrompts

if TYPE_CHECKING:
    from actstore.hooks.model import HookedModel

_SPAWNED: Final = multiprocessing.get_context("spawn")


class ModelProcess:
    """One process with one model, which is loaded by the first request. One thread at a time may use it."""

    def __init__(self, model: str) -> None:
        """``model`` is the Hub name or folder of the model."""
        self._model = model
        self._processes: ProcessPoolExecutor | None = None

    def places(self, url: str, prompts: list[Any], hooks: list[str], limits: Limits) -> StoredPrompts:
        """Where a store has the activations of prompts, once those that it lacks are computed.

        Args:
            url: URL of the store.
            prompts: texts or token ids.
            hooks: names or globs.
            limits: what one request may cost.

        Raises:
            Problem: the process was killed; it is started again by the next request.
            ActstoreError: see `actstore.activations`.
        """
        if self._processes is None:
            self._processes = ProcessPoolExecutor(1, _SPAWNED, _end_with_parent)
        try:
            return self._processes.submit(_places, self._model, url, prompts, hooks, limits).result()
        except BrokenProcessPool as error:
            self._processes = None
            raise Problem(
                503, "busy", "the process of the model was killed, perhaps for its memory; ask again", LATER
            ) from error

    def close(self) -> None:
        """End the process, once it has finished what it does."""
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end with the server, also when that is killed; Ctrl-C is for the server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)  # what is not committed is not there

    threading.Thread(target=wait, name="parent", daemon=True).start()


_loaded: "dict[str, HookedModel]" = {}
"""The model by its dtype, at most one: that of the store that was asked for last."""


def _places(model: str, url: str, prompts: list[Any], hooks: list[str], limits: Limits) -> StoredPrompts:
    from actstore.recall.activations import stored_prompts

    return stored_prompts(_model_for(model, url), prompts, hooks, url, limits)


def _model_for(model: str, url: str) -> "HookedModel | str":
    """The model as the store was begun with it: in memory, or by its name, which is loaded for each run."""
    from actstore.hooks.model import HookedModel
    from actstore.storage.opening import open_blobs
    from actstore.store.records.run import read_runs

    request = read_runs(open_blobs(url))[0].plan.request
    if not request.model.was_in_memory:
        return model
    if request.dtype not in _loaded:
        _loaded.clear()
        _loaded[request.dtype] = HookedModel.from_pretrained(model, dtype=request.dtype)
    return _loaded[request.dtype]
