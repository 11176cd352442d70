"""A dashboard of features: one pass over a store, then a folder of pages and tables."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Unpack

import numpy as np

from actstore.analysis.dashboards.chosen_features import ChosenFeatures
from actstore.analysis.dashboards.feature_page import Pages
from actstore.analysis.dashboards.folder import INDEX, Folder
from actstore.analysis.dashboards.index_page import index_page
from actstore.analysis.dashboards.logits import Logits, logits_of
from actstore.analysis.dashboards.style import shown
from actstore.analysis.dashboards.tables import activations_table, features_table, parquet
from actstore.analysis.dashboards.texts import Contexts, texts_of
from actstore.analysis.feature_activations.activation_examples import ActivationExamples, examples_of
from actstore.analysis.feature_activations.distribution import N_BINS, Distribution
from actstore.analysis.feature_activations.statistics import FeatureStatistics
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.analysis.scanning.reduction import Reduction
from actstore.analysis.scanning.scan import ScanOptions, scan
from actstore.analysis.text import tokenizer_of
from actstore.errors import JobError

if TYPE_CHECKING:
    import torch

    from actstore.hooks.naming.names import HookName
    from actstore.store.committed_store import CommittedStore

_VERSION: Final = 1
"""Raised when pages or tables change: a dashboard is not completed with pages of another version."""

OnPage = Callable[[int, int], None]
"""Called with the pages that are done, and their number in all."""


@dataclass(frozen=True)
class Dashboard:
    """A dashboard that is complete."""

    url: str
    """Its folder."""
    hook: str
    n_features: int | None
    """Features that have pages; None where an earlier call had made all of them."""
    n_pages_before: int | None
    """Pages that an earlier call had made; None for all."""
    n_rows: int | None
    """Rows that were looked at; None where nothing was left to do."""
    seconds: float

    @property
    def index(self) -> str:
        """The page to open."""
        return f"{self.url}/{INDEX}"

    def __str__(self) -> str:
        if self.n_features is None:
            return f"{self.index} is complete already"
        return (
            f"{self.n_features:,} features over {self.n_rows:,} rows in {self.seconds:,.1f} s: {self.index}"
        )


def dashboard(
    store: "CommittedStore",
    hook: "HookName",
    of: Any,
    features: "Sequence[int] | range | None" = None,
    *,
    out: str = "dashboard",
    model: Any = None,
    W_U: "torch.Tensor | None" = None,  # noqa: N803
    k: int = 20,
    n_intervals: int = 16,
    n_samples: int = 5,
    before: int = 20,
    after: int = 10,
    n_logits: int = 10,
    seed: int = 0,
    on_page: OnPage | None = None,
    **options: Unpack[ScanOptions],
) -> Dashboard:
    """Write a dashboard of features: a folder of pages that load nothing, and two tables in Parquet.

    The index is written last, so a folder without it is not complete. The same call continues one: pages that are there
    are not made again, and with ``resume``, nor is the scan.

    Args:
        store: the store; its tokenizer gives the text.
        hook: a stored hook.
        of: directions, neurons, an SAE or a function, as for `top_activations`.
        features: numbers of the features, such as ``range(1000)``; None for all.
        out: path or URL of the folder: a new or empty one, or one with a part of this dashboard.
        model: a `HookedModel`, for the tokens whose logits each feature raises and lowers most.
        W_U: the matrix [d_model, d_vocab] for these, in the place of a model.
        k: largest rows of each feature, one of each sequence.
        n_intervals: intervals of values above 0, a power of two up to 64; see `activation_examples`.
        n_samples: rows from each interval.
        before, after: tokens that are shown around each row.
        n_logits: tokens at each end of the logits.
        seed: another one gives other samples.
        on_page: called after each page with the number of pages that are done, and that of all.
        options: which rows, how to resume, where to compute, and how to show progress: see `scan`.

    Raises:
        JobError: an argument is not valid.
        StorageError: the folder holds something else.
        TokensError: the tokenizer is unknown or missing, or is not the same any more.
        ActstoreError: see `scan`.
    """
    started = time.perf_counter()
    store.check_version()
    array = store.array_of(hook)
    chosen = ChosenFeatures.of(of, array.shape, features)
    if n_intervals > N_BINS:
        raise JobError(f"n_intervals is {n_intervals}; it must be a power of two, from 1 to {N_BINS}")
    if n_logits < 1:
        raise JobError(f"n_logits is {n_logits}; it must be 1 or more")
    window = (before, after)
    reduction = examples_of(store, hook, chosen.features, k, n_intervals, n_samples, window, None, seed)
    counting = Distribution(array.name, chosen.features)
    logits = _logits(chosen, model, W_U, n_logits)
    tokenizer = tokenizer_of(store)
    rows = ChosenRows.of(store, options.get("drop", ()), options.get("seqpos"), options.get("sequences"))
    # Dashboards are shared, and the folders of whoever made one are nobody's business.
    name = store.url.rstrip("/").rpartition("/")[2]
    about = {
        "actstore": "dashboard",
        "store": name,
        "hook": array.name,
        "identity": _identity(store, [reduction, counting], rows, chosen, logits),
    }
    folder = Folder.opened(out, about)
    url = folder.blobs.url
    if folder.is_complete:
        return Dashboard(url, array.name, None, None, None, time.perf_counter() - started)
    scanned = scan(store, {"examples": reduction, "distribution": counting}, **options)
    statistics = FeatureStatistics.of(
        counting, scanned.results["distribution"], scanned.n_rows, sum(scanned.n_not_finite.values())
    )
    examples = ActivationExamples.made(store, reduction, scanned.results["examples"])
    contexts = Contexts.of(store, examples)
    texts = texts_of(tokenizer, contexts.ids, *([] if logits is None else [logits.top, logits.bottom]))
    numbers = np.arange(len(statistics)) if chosen.numbers is None else chosen.numbers
    html = {token: shown(text) for token, text in texts.items()}
    pages = Pages(numbers, statistics, examples, contexts, logits, html)
    n_before = _write(folder, pages, texts, f"{scanned.n_rows:,} rows of {name}", on_page)
    return Dashboard(url, array.name, len(numbers), n_before, scanned.n_rows, time.perf_counter() - started)


def _logits(chosen: ChosenFeatures, model: Any, W_U: "torch.Tensor | None", k: int) -> Logits | None:  # noqa: N803
    of = model if W_U is None else W_U
    if of is None:
        return None
    if chosen.decoder is None:
        raise JobError(
            "these features have no directions that a model or W_U could be used with; leave model and W_U out"
        )
    return logits_of(chosen.decoder, of, k)


def _identity(
    store: "CommittedStore",
    reductions: list[Reduction],
    rows: ChosenRows,
    chosen: ChosenFeatures,
    logits: Logits | None,
) -> str:
    """A text that differs for other dashboards."""
    try:
        parts = [reduction.identity() for reduction in reductions]
    except JobError:
        # A function cannot be told from another one, so nothing that is there can be continued.
        parts = [uuid.uuid4().hex]
    # The same directions can be features of other numbers, which are the names of their pages.
    numbers = None if chosen.numbers is None else chosen.numbers.tolist()
    text = json.dumps([_VERSION, str(store.identity), *parts, rows.identity(), numbers])
    digest = hashlib.sha256(text.encode())
    if logits is not None:
        for array in vars(logits).values():
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write(folder: Folder, pages: Pages, texts: dict[int, str], where: str, on_page: OnPage | None) -> int:
    """Write all files, the index last; returns how many pages were there."""
    n_pages, n_done = len(pages.numbers), 0

    def count() -> None:
        nonlocal n_done
        n_done += 1
        if on_page is not None:
            on_page(n_done, n_pages)

    n_before = folder.write_pages(
        ((number, lambda i=i: pages.page(i)) for i, number in enumerate(pages.numbers.tolist())),  # type: ignore[misc]
        count,
    )
    folder.write("features.parquet", parquet(features_table(pages, texts)))
    folder.write("activations.parquet", parquet(activations_table(pages, texts)))
    folder.write(INDEX, index_page(pages, texts, where))
    return n_before
