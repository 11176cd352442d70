"""Probes of several hooks: a table, a picture, files."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.probes.probe import Kind, Probe
from actstore.counted import counted
from actstore.errors import HookError, JobError, MissingExtraError

if TYPE_CHECKING:
    import torch

_MOST_TICKS: Final = 40


@dataclass(frozen=True, eq=False)
class Probes:
    """A probe for each hook, fitted and measured on the same rows. ``probes[hook]``, or ``probes.best``."""

    probes: tuple[Probe, ...]
    """In model order."""
    kind: Kind
    classes: tuple[Any, ...]
    n_rows: tuple[int, int]
    """Training and held-out rows."""
    n_documents: tuple[int, int]
    """Training and held-out documents."""
    baseline: float | None
    """Accuracy, on the held-out rows, of always saying the most frequent class of the training rows; None where
    numbers are predicted, whose R2 is 0 for the mean.
    """
    baseline_class: Any
    n_unlabelled: int
    """Rows that the options choose and that have no label; they are not used."""
    n_not_finite: int
    """Labelled rows that were left out, since one of the hooks holds NaN or infinity there."""
    n_passes: int
    """Passes over the rows."""
    n_reads: int
    """Scans of the store, some of which may be of a part of the hooks."""
    seconds: float
    is_training: NDArray[np.bool_] = field(repr=False)
    """Rows that the probes were fitted on, [n_sequences, entries]."""
    is_held_out: NDArray[np.bool_] = field(repr=False)
    """Rows that they were measured on, [n_sequences, entries]."""

    def __len__(self) -> int:
        return len(self.probes)

    def __iter__(self) -> Iterator[Probe]:
        return iter(self.probes)

    def __getitem__(self, hook: str | int) -> Probe:
        """The probe of a hook, or the n-th one.

        Raises:
            HookError: there is no probe of the hook.
        """
        if isinstance(hook, int):
            return self.probes[hook]
        for probe in self.probes:
            if probe.hook == hook:
                return probe
        raise HookError(
            f"there is no probe of {hook!r}; there are {', '.join(one.hook for one in self.probes)}"
        )

    @property
    def best(self) -> Probe:
        """The probe with the highest accuracy, or R2, on the held-out rows."""
        return max(self.probes, key=lambda probe: probe.metrics[probe.main_metric].value)

    def records(self) -> list[dict[str, Any]]:
        """A mapping for each hook: its metrics with their intervals, penalty, baseline, and learning curve."""
        records = []
        for probe in self.probes:
            record: dict[str, Any] = {"hook": probe.hook, "kind": probe.kind, "l2": probe.l2}
            for name, one in probe.metrics.items():
                record |= {name: one.value, f"{name}_low": one.low, f"{name}_high": one.high}
            record["baseline"] = self.baseline
            record["n_train_rows"], record["n_held_out_rows"] = self.n_rows
            record["n_train_documents"], record["n_held_out_documents"] = self.n_documents
            record["is_converged"] = probe.is_converged
            record["curve_documents"], record["curve"] = list(probe.curve), list(probe.curve.values())
            records.append(record)
        return records

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain data; those that are not known, such as intervals without resamples, are None."""
        return {
            "kind": self.kind,
            "classes": list(self.classes),
            "baseline": self.baseline,
            "baseline_class": self.baseline_class,
            "n_train_rows": self.n_rows[0],
            "n_held_out_rows": self.n_rows[1],
            "n_train_documents": self.n_documents[0],
            "n_held_out_documents": self.n_documents[1],
            "n_unlabelled": self.n_unlabelled,
            "n_not_finite": self.n_not_finite,
            "n_passes": self.n_passes,
            "n_reads": self.n_reads,
            "seconds": self.seconds,
            "probes": [
                {
                    "hook": probe.hook,
                    "l2": probe.l2,
                    "metrics": {
                        name: {"value": _known(one.value), "low": _known(one.low), "high": _known(one.high)}
                        for name, one in probe.metrics.items()
                    },
                    "by_l2": [[l2, loss] for l2, loss in probe.by_l2.items()],
                    "curve": [[n, value] for n, value in probe.curve.items()],
                    "is_converged": probe.is_converged,
                }
                for probe in self.probes
            ],
        }

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write one line for each hook, with the columns of `records`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(self.records()), Path(path))

    @property
    def only(self) -> Probe:
        """The probe, where there is one.

        Raises:
            JobError: there are several.
        """
        if len(self.probes) > 1:
            raise JobError(
                f"there are probes of {len(self.probes)} hooks; choose one by its hook, or take best"
            )
        return self.probes[0]

    def as_direction(self, label: Any = None, *, normalise: bool = False) -> "torch.Tensor":
        """`Probe.as_direction` of the only probe."""
        return self.only.as_direction(label, normalise=normalise)

    def scores(self, rows: Any) -> NDArray[np.float64]:
        """`Probe.scores` of the only probe."""
        return self.only.scores(rows)

    def predict(self, rows: Any) -> NDArray[Any]:
        """`Probe.predict` of the only probe."""
        return self.only.predict(rows)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write each probe to ``<path>/<hook>.safetensors``, or the only one to a path that ends with .safetensors.

        Returns:
            The files, which `Probe.load` reads.
        """
        into = Path(path)
        if into.suffix == ".safetensors":
            self.only.save(into)
            return [into]
        into.mkdir(parents=True, exist_ok=True)
        files = []
        for probe in self.probes:
            files.append(into / f"{probe.hook}.safetensors")
            probe.save(files[-1])
        return files

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw accuracy, or R2, by hook with its interval, and write it as PNG if there is a path.

        Returns:
            The figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtraError("a picture needs matplotlib: pip install 'actstore[plot]'") from error

        name = self.probes[0].main_metric
        figures = [probe.metrics[name] for probe in self.probes]
        places = range(len(figures))
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.fill_between(
            places, [one.low for one in figures], [one.high for one in figures], alpha=0.2, color="C0", lw=0
        )
        axes.plot(
            places, [one.value for one in figures], "o-", ms=3, lw=1.2, color="C0", label=f"{self.kind} probe"
        )
        if self.baseline is not None:
            axes.axhline(self.baseline, color="0.5", ls="--", lw=1, label=f"always {self.baseline_class!r}")
        hooks, label = _shortened([probe.hook for probe in self.probes])
        every = -(-len(hooks) // _MOST_TICKS)
        is_long = max(map(len, hooks)) > 3
        axes.set_xticks(
            places[::every],
            hooks[::every],
            rotation=60 if is_long else 0,
            ha="right" if is_long else "center",
            fontsize=7,
        )
        axes.set_xlabel(label, fontsize=9)
        axes.set_ylabel({"r2": "R2"}.get(name, name), fontsize=9)
        axes.set_title(
            f"{self.n_documents[1]:,} held-out documents; the band holds 95 % of resamples", fontsize=9
        )
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def _repr_html_(self) -> str:
        names = list(self.probes[0].metrics)
        head = "".join(f"<th>{cell}</th>" for cell in ("hook", *names, "l2"))
        body = "".join(
            "<tr>"
            + "".join(
                f"<td>{escape(cell)}</td>"
                for cell in (probe.hook, *(str(probe.metrics[name]) for name in names), _l2(probe))
            )
            + "</tr>"
            for probe in self.probes
        )
        return f"<p>{escape(self._summary)}</p><table><tr>{head}</tr>{body}</table>"

    def __str__(self) -> str:
        names = list(self.probes[0].metrics)
        rows = [("hook", *names, "l2")]
        rows += [
            (probe.hook, *(str(probe.metrics[name]) for name in names), _l2(probe)) for probe in self.probes
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self._summary, "", *lines])

    def __repr__(self) -> str:
        best = self.best
        return f"<Probes {self._summary}; best {best.hook} with {best.metrics[best.main_metric]}>"

    @property
    def _summary(self) -> str:
        against = (
            "" if self.baseline is None else f", {self.baseline:.3f} right by always {self.baseline_class!r}"
        )
        without = f", {counted(self.n_unlabelled, 'row')} without a label" if self.n_unlabelled else ""
        return (
            f"{self.kind}, {counted(len(self.probes), 'hook')}: trained on {self.n_rows[0]:,} rows of "
            f"{self.n_documents[0]:,} documents, measured on {self.n_rows[1]:,} rows of {self.n_documents[1]:,} "
            f"held-out ones{against}{without}"
        )


def _known(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None


def _l2(probe: Probe) -> str:
    return "" if probe.l2 is None else f"{probe.l2:g}"


def _shortened(hooks: list[str]) -> tuple[list[str], str]:
    """Layers as ticks and what they are of, where hooks differ by their layer alone."""
    parts = [hook.split(".", 2) for hook in hooks]
    if (
        len(hooks) > 1
        and all(len(part) == 3 and part[0] == "blocks" for part in parts)
        and len({part[2] for part in parts}) == 1
    ):
        return [part[1] for part in parts], f"layer of {parts[0][2]}"
    return hooks, "hook"
