"""The page of a feature: its figures, its histogram, its logits, and its examples with every token coloured."""

import html
import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from actstore.analysis.dashboards.logits import Logits
from actstore.analysis.dashboards.style import number, page
from actstore.analysis.dashboards.texts import Contexts
from actstore.analysis.feature_activations.activation_examples import ActivationExamples
from actstore.analysis.feature_activations.statistics import FeatureStatistics, Histogram

SCRIPT: Final = """
addEventListener("keydown",e=>{if(e.ctrlKey||e.metaKey||e.altKey)return;
const to={ArrowLeft:"prev",k:"prev",ArrowRight:"next",j:"next",i:"up"}[e.key];
const link=to&&document.querySelector(`a[rel=${to}]`);if(link)location.href=link.href});
""".strip()


@dataclass(frozen=True)
class Pages:
    """What the pages of all features are made of."""

    numbers: NDArray[np.int64]
    """Number of each feature, [n_features]."""
    statistics: FeatureStatistics
    examples: ActivationExamples
    contexts: Contexts
    logits: Logits | None
    shown: dict[int, str]
    """HTML of each token id."""

    def page(self, feature: int) -> bytes:
        """The page of a feature, by its place among the chosen ones."""
        title = f"Feature {self.numbers[feature]} of {self.statistics.hook}"
        parts = [self._links(feature), f"<h1>{html.escape(title)}</h1>", self._figures(feature)]
        parts.append(histogram_svg(self.statistics.histogram(feature)))
        if self.logits is not None:
            parts.append(self._logits(self.logits, feature))
        return page(title, "\n".join([*parts, *self._groups(feature)]), SCRIPT)

    def _links(self, feature: int) -> str:
        links = []
        if feature:
            links.append(f'<a rel="prev" href="{self.numbers[feature - 1]}.html">← previous</a>')
        links.append('<a rel="up" href="../index.html">all features</a>')
        if feature + 1 < len(self.numbers):
            links.append(f'<a rel="next" href="{self.numbers[feature + 1]}.html">next →</a>')
        return f"<nav>{''.join(links)}<small>keys: ← → i</small></nav>"

    def _figures(self, feature: int) -> str:
        of = self.statistics
        figures = {
            "density": f"{of.density[feature]:.3%}",
            f"rows above {number(of.above)}": f"{of.n_active[feature]:,} of {of.n_values[feature]:,}",
            "largest": number(of.maximum[feature]),
            "mean": number(of.mean[feature]),
            "smallest": number(of.minimum[feature]),
        }
        if of.n_not_finite[feature]:
            figures["NaN or infinite"] = f"{of.n_not_finite[feature]:,}"
        return (
            "<dl>"
            + "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in figures.items())
            + "</dl>"
        )

    def _logits(self, logits: Logits, feature: int) -> str:
        sides = {
            "Logits raised most": (logits.top[feature], logits.top_values[feature]),
            "Logits lowered most": (logits.bottom[feature], logits.bottom_values[feature]),
        }
        parts = []
        for title, (ids, values) in sides.items():
            rows = "".join(
                f"<tr><td><code>{self.shown[token]}</code></td><td>{value:+.3g}</td></tr>"
                for token, value in zip(ids.tolist(), values.tolist(), strict=True)
            )
            parts.append(f"<div><h2>{title}</h2><table><tbody>{rows}</tbody></table></div>")
        return f'<div class="two">{"".join(parts)}</div>'

    def _groups(self, feature: int) -> list[str]:
        """The examples: the largest rows, and those of each interval."""
        places = self.examples.of(feature)
        if not places:
            return ["<h2>No row is active</h2>"]
        parts, scale = [], self._scale(feature)
        intervals = self.examples.intervals[places.start : places.stop].tolist()
        before = None
        for place, interval in zip(places, intervals, strict=True):
            if interval != before:
                parts.append(f"<h2>{self._heading(feature, interval)}</h2>")
                before = interval
            parts.append(self._context(place, scale))
        return parts

    def _heading(self, feature: int, interval: int) -> str:
        if interval < 0:
            return "Largest, one of each sequence"
        low, high, share = interval_of(self.statistics, self.examples, feature, interval)
        return f"{low:.4g} to {high:.4g}: {share:.3%} of rows"

    def _scale(self, feature: int) -> float:
        largest = float(self.statistics.maximum[feature])
        return largest if largest > 0 else max(-float(self.statistics.minimum[feature]), 1e-30)

    def _context(self, place: int, scale: float) -> str:
        """One example: where it is, and its tokens, coloured where the feature is not 0."""
        examples = self.examples
        texts = ["" if token < 0 else self.shown[token] for token in self.contexts.ids[place].tolist()]
        values = examples.windows[place].tolist()
        for i, value in enumerate(values):
            if value and value == value and texts[i]:
                share = min(1.0, abs(value) / scale)
                kind = ("n" if value < 0 else "") + (" p" if i == examples.before else "")
                name = f' class="{kind.strip()}"' if kind else ""
                texts[i] = f'<b{name} style="--a:{share:.2f}" title="{value:.3g}">{texts[i]}</b>'
        where = f"sequence {examples.sequences[place]}, position {examples.positions[place]}"
        short = f"{examples.sequences[place]}:{examples.positions[place]}"
        label = f'<small title="{where}">{values[examples.before]:.3g} · {short}</small>'
        return f'<p class="c">{label}<span class="t">{"".join(texts)}</span></p>'


def interval_of(
    statistics: FeatureStatistics, examples: ActivationExamples, feature: int, interval: int
) -> tuple[float, float, float]:
    """Lower end (0 is not in it) and upper end of an interval, and the fraction of rows in it."""
    width = float(examples.widths[feature])
    bins_each = statistics.counts.shape[2] // examples.n_intervals
    counts = statistics.counts[feature, 0, interval * bins_each : (interval + 1) * bins_each]
    share = float(counts.sum() / statistics.n_values[feature])
    # The last interval ends at the largest value.
    return interval * width, min((interval + 1) * width, float(statistics.maximum[feature])), share


def histogram_svg(histogram: Histogram) -> str:
    """Bars for all values but 0, with logarithmic heights."""
    if not len(histogram.counts):
        return ""
    low, high = float(histogram.edges[0]), float(histogram.edges[-1])
    most = math.log1p(int(histogram.counts.max()))
    bars = []
    for i, count in enumerate(histogram.counts.tolist()):
        if count:
            left = (histogram.edges[i] - low) / (high - low) * 1000
            width = (histogram.edges[i + 1] - histogram.edges[i]) / (high - low) * 1000
            height = math.log1p(count) / most * 200
            kind = ' class="neg"' if histogram.edges[i + 1] <= 0 else ""
            label = f"{histogram.edges[i]:.4g} to {histogram.edges[i + 1]:.4g}: {count:,}"
            bars.append(
                f'<rect{kind} x="{left:.1f}" y="{200 - height:.1f}" width="{max(width - 1, 1):.1f}" '
                f'height="{height:.1f}"><title>{label}</title></rect>'
            )
    return (
        f'<figure><svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" aria-label="histogram">'
        f"{''.join(bars)}</svg><figcaption>values other than 0, from {low:.4g} to {high:.4g}; heights are "
        f"logarithmic, the highest {int(histogram.counts.max()):,}</figcaption></figure>"
    )
