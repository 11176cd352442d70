"""A dashboard as Parquet: a table of features and one of examples, with the names of Neuronpedia's fields."""

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.dashboards.feature_page import Pages, interval_of

if TYPE_CHECKING:
    import pyarrow as pa


def features_table(pages: Pages, texts: dict[int, str]) -> "pa.Table":
    """One row for each feature; docs/dashboards.md says what the columns are."""
    import pyarrow as pa

    of = pages.statistics
    histograms = [of.histogram(feature) for feature in range(len(of))]
    columns: dict[str, Any] = {
        "feature_index": pages.numbers,
        "frac_nonzero": of.density,
        "n_active": of.n_active,
        "n_values": of.n_values,
        "max_activation": of.maximum,
        "mean_activation": of.mean,
        "min_activation": of.minimum,
        "freq_hist_data_bar_values": [(one.edges[:-1] + one.edges[1:]) / 2 for one in histograms],
        "freq_hist_data_bar_heights": [one.counts for one in histograms],
    }
    if pages.logits is not None:
        columns |= {
            "pos_str": [[texts[token] for token in row] for row in pages.logits.top.tolist()],
            "pos_values": list(pages.logits.top_values),
            "neg_str": [[texts[token] for token in row] for row in pages.logits.bottom.tolist()],
            "neg_values": list(pages.logits.bottom_values),
        }
    return pa.table(columns)


def activations_table(pages: Pages, texts: dict[int, str]) -> "pa.Table":
    """One row for each example, in the order of the pages."""
    import pyarrow as pa

    examples, contexts = pages.examples, pages.contexts
    is_there = contexts.ids >= 0
    lengths = is_there.sum(1)
    offsets: pa.Int32Array = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    ids, values = contexts.ids[is_there], examples.windows[is_there]
    nullable: pa.FloatArray = pa.array(values, pa.float32(), mask=np.isnan(values))
    known = np.array(sorted(texts), np.int64)
    tokens = pa.array([texts[token] for token in known.tolist()], pa.string()).take(
        np.searchsorted(known, ids)
    )
    bins = _bins(pages)
    columns: dict[str, Any] = {
        "feature_index": pages.numbers[examples.features],
        "bin_min": bins[:, 0],
        "bin_max": bins[:, 1],
        "bin_contains": bins[:, 2],
        "qualifying_token_index": is_there[:, : examples.before].sum(1),
        "tokens": pa.ListArray.from_arrays(offsets, tokens),
        "values": pa.ListArray.from_arrays(offsets, nullable),
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(ids, pa.int32())),
        "max_value": examples.values,
        "sequence": examples.sequences,
        "position": examples.positions,
        "document": contexts.documents,
    }
    return pa.table(columns)


def _bins(pages: Pages) -> NDArray[np.float64]:
    """Lower end, upper end and share of the interval of each example, [n_examples, 3]; -1, the largest value and -1 for
    the largest rows, as SAEDashboard has them.
    """
    examples = pages.examples
    bins = np.empty((len(examples), 3))
    known: dict[tuple[int, int], tuple[float, float, float]] = {}
    for place, key in enumerate(zip(examples.features.tolist(), examples.intervals.tolist(), strict=True)):
        if key not in known:
            feature, interval = key
            largest = float(pages.statistics.maximum[feature])
            known[key] = (
                (-1.0, largest, -1.0)
                if interval < 0
                else interval_of(pages.statistics, examples, feature, interval)
            )
        bins[place] = known[key]
    return bins


def parquet(table: "pa.Table") -> bytes:
    """The bytes of a file."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd")
    return file.getvalue()
