"""Whether a reduction gives the same bits in any order of units, and after an interruption."""

from pathlib import Path
from typing import Any

import pytest

from actstore.analysis.scanning.reduction import Reduction
from actstore.analysis.scanning.scan import Progress, Scanned, scan
from actstore.facade import Store


def same_arrays(left: Scanned, right: Scanned) -> None:
    """Compare all bits of the states of two scans."""
    for name, state in left.results.items():
        ours, theirs = state.arrays(), right.results[name].arrays()
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].shape == theirs[key].shape, key
            assert ours[key].tobytes() == theirs[key].tobytes(), key


def same_bits_in_any_order(
    store: Store, reduction: Reduction, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Scan in order, backwards, and interrupted and resumed; returns the state.

    Args:
        store: a store of several units.
        reduction: the reduction; its state must be its result.
        kept: a folder that does not exist.
        monkeypatch: replaces the executor for a while.
    """
    whole = scan(store, {"it": reduction})
    assert whole.n_units > 3

    def stop(progress: Progress) -> None:
        if 2 * progress.n_sequences >= progress.n_sequences_in_all:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scan(store, {"it": reduction}, resume=str(kept), on_progress=stop)
    again = scan(store, {"it": reduction}, resume=str(kept))
    assert 0 < again.n_units_before < whole.n_units
    same_arrays(whole, again)

    def backwards(spec: Any, pending: Any, resources: Any, on_done: Any) -> None:
        worker = spec.start()
        for index in reversed(pending):
            on_done(worker.run(index))
        worker.close()

    with monkeypatch.context() as patched:
        patched.setattr("actstore.analysis.scanning.scan.find_executor", lambda name: backwards)
        same_arrays(whole, scan(store, {"it": reduction}))
    return whole.results["it"]
