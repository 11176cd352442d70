"""Repeats requests after transient failures, a limited number of times, with growing random pauses, and counts them."""

import logging
import math
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final, TypeVar

import tenacity

from actstore.errors import StorageError
from actstore.storage.errors import TRANSIENT, Kind, RequestError, explained

MAX_TRIES: Final = 8
MAX_SECONDS: Final = 60.0
"""Seconds after which no further try begins, except that each request gets at least a second one."""
FIRST_PAUSE_S = 0.2
"""The n-th pause is random between 0 and ``FIRST_PAUSE_S * 2**n``, so that workers that failed together do not try
again together. Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/"""
MAX_PAUSE_S = 10.0
_STRANGER_S: Final = 10.0
_TRIES_OF_A_STRANGER: Final = 3
"""Tries of requests to a server that never answered: more likely a wrong address than a fault that passes."""

TELL_S = 10.0
"""A request that is repeated for longer is logged, and again after each such time, so that users know why they wait."""

_T = TypeVar("_T")
_LOG: Final = logging.getLogger(__name__)


class Retries:
    """Runs requests to one storage; any number of threads may share it.

    The clients' own retries must be off, so that every repeated request is counted here.
    """

    def __init__(self, url: str, *, patience_s: float | None = None) -> None:
        """
        Args:
            url: URL of the storage.
            patience_s: seconds for which a request is repeated; None for the limits `MAX_TRIES` and `MAX_SECONDS`.
        """
        self._url = url
        self._patience_s = patience_s
        self._n = 0
        self._logged_at = -math.inf
        self._lock = threading.Lock()
        self._has_answered = False

    @property
    def n(self) -> int:
        """Number of requests repeated so far."""
        with self._lock:
            return self._n

    def run(self, key: str, verb: str, request: Callable[[], _T]) -> _T:
        """Send a request until it succeeds or fails for good, and return its result.

        Args:
            key: key of the blob, for the error.
            verb: what is done to it, for the error: "written", "read", "listed", "deleted".
            request: sends the request and raises `RequestError` when it fails; it does no harm when repeated.

        Raises:
            StorageError: the request failed for good, or too often; `BlobNotFoundError` where there is no such blob.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._is_transient),
            stop=self._is_enough,
            wait=tenacity.wait_random_exponential(multiplier=FIRST_PAUSE_S, max=MAX_PAUSE_S),
            before_sleep=partial(self._repeated, key, verb),
            reraise=True,
        )
        try:
            result = retrying(request)
        except RequestError as error:
            failure = explained(error, self._url, key, verb)
            if error.kind not in TRANSIENT:
                raise failure from error.__cause__
            statistics = retrying.statistics
            hint = "; the same command goes on from what is committed" if verb == "written" else ""
            raise StorageError(
                f"{failure}; tried {statistics['attempt_number']} times in "
                f"{statistics['delay_since_first_attempt']:.1f} s{hint}"
            ) from error.__cause__
        self._has_answered = True
        return result

    def _is_transient(self, error: BaseException) -> bool:
        if not isinstance(error, RequestError):
            return False
        if error.kind is not Kind.UNREACHABLE:
            self._has_answered = True
        return error.kind in TRANSIENT

    def _is_enough(self, state: tenacity.RetryCallState) -> bool:
        seconds = state.seconds_since_start or 0.0
        if self._patience_s is not None:
            return seconds >= (self._patience_s if self._has_answered else min(_STRANGER_S, self._patience_s))
        limit = MAX_TRIES if self._has_answered else _TRIES_OF_A_STRANGER
        return state.attempt_number >= limit or (state.attempt_number > 1 and seconds >= MAX_SECONDS)

    def _repeated(self, key: str, verb: str, state: tenacity.RetryCallState) -> None:
        """Count a request that is repeated, and log the reason for those who wait for it."""
        seconds, now = state.seconds_since_start or 0.0, time.monotonic()
        with self._lock:
            self._n += 1
            is_logged = seconds >= TELL_S and now - self._logged_at >= TELL_S
            if is_logged:
                self._logged_at = now
        error = None if state.outcome is None else state.outcome.exception()
        if is_logged and isinstance(error, RequestError):
            reason = explained(error, self._url, key, verb)
            _LOG.warning("%s; trying again for %.0f s now", reason, seconds)
