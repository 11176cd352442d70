"""Results that follow from a frozen object alone, remembered as long as it lives: a store of a thousand runs would
otherwise write out a thousand plans for each look at it.
"""

import weakref
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def remembered(make: Callable[[T], R]) -> Callable[[T], R]:
    """A function of one frozen object that is computed once for each, found again by its identity: equal objects are
    not compared, since that costs as much.
    """
    results: dict[int, R] = {}

    def get(of: T) -> R:
        key = id(of)
        if key not in results:
            result = make(of)
            weakref.finalize(of, results.pop, key, None).atexit = False
            results[key] = result
        return results[key]

    return get
