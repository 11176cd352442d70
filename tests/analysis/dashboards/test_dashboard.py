"""Dashboards: pages and tables against NumPy, and folders that are continued or refused."""

import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import actstore
from actstore import analysis
from actstore.analysis.dashboards.style import page
from actstore.analysis.scanning.scan import Progress
from actstore.errors import JobError, StorageError, TokensError
from tests.analysis.dashboards.conftest import EVIL, HOOK, Small
from tests.analysis.stores import store_of

NUMBERS = [1, 3, 4, 5, 11]


class Page(HTMLParser):
    """The texts of a page as a browser takes them: each context as its tokens with a value, and the text around."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.contexts: list[list[tuple[str, str | None, bool]]] = []
        """Of each context its pieces: text, value, and whether it is the row's own token."""
        self.headings: list[str] = []
        self.links: dict[str, str] = {}
        self.tags: set[str] = set()
        self._in: list[tuple[str, dict[str, Any]]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        self.tags.add(tag)
        if tag == "a":
            self.links[str(of["rel"])] = str(of["href"])
        if of.get("class") == "t":
            self.contexts.append([])
        self._in.append((tag, of))

    def handle_endtag(self, tag: str) -> None:
        while self._in and self._in.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tag, of = self._in[-1] if self._in else ("", {})
        if tag == "h2":
            self.headings.append(data)
        if any(kind.get("class") == "t" for _, kind in self._in):
            value = str(of["title"]) if tag == "b" else None
            self.contexts[-1].append((data, value, "p" in str(of.get("class", "")).split()))


def as_shown(token: str) -> str:
    return token.replace("\n", "↵").replace("\u202e", "\N{REPLACEMENT CHARACTER}")


def test_tables_are_what_numpy_says(small: Small, made: Path) -> None:
    features = small.features
    table = pq.read_table(made / "features.parquet").to_pydict()
    assert table["feature_index"] == NUMBERS
    flat = features.reshape(-1, 12)[:, NUMBERS]
    np.testing.assert_allclose(table["frac_nonzero"], (flat > 0).mean(0))
    np.testing.assert_allclose(table["max_activation"], flat.max(0), rtol=1e-5)
    np.testing.assert_allclose(table["mean_activation"], flat.mean(0), rtol=1e-4, atol=1e-5)
    for heights, middles, column in zip(
        table["freq_hist_data_bar_heights"], table["freq_hist_data_bar_values"], flat.T, strict=True
    ):
        width = middles[1] - middles[0]
        edges = np.array([*middles, middles[-1] + width]) - width / 2
        np.testing.assert_array_equal(heights, np.histogram(column, edges)[0])
    rows = pq.read_table(made / "activations.parquet").to_pylist()
    assert {row["feature_index"] for row in rows} == set(NUMBERS)
    for row in rows:
        values = features[..., row["feature_index"]]
        sequence, position = row["sequence"], row["position"]
        at = slice(max(0, position - 6), position + 4)
        assert row["tokens"] == small.tokens[sequence][at]
        assert row["token_ids"] == small.store.tokens[sequence][at].tolist()
        np.testing.assert_allclose(row["values"], values[sequence, at], rtol=1e-4, atol=1e-5)
        assert row["values"][row["qualifying_token_index"]] == row["max_value"]
        assert row["max_value"] == pytest.approx(values[sequence, position], rel=1e-4)
        if row["bin_min"] < 0:
            assert row["bin_max"] == pytest.approx(values.max(), rel=1e-5)
            assert row["bin_contains"] == -1
        else:
            assert row["bin_min"] <= row["max_value"] <= row["bin_max"]
            share = (
                (values >= row["bin_min"]) & (values > 0) & (values <= row["bin_max"] * (1 + 1e-6))
            ).mean()
            assert row["bin_contains"] == pytest.approx(share)
    for number in NUMBERS:
        top = [row["max_value"] for row in rows if row["feature_index"] == number and row["bin_min"] < 0]
        expected = np.sort(features[..., number].max(1))[::-1][:4]
        np.testing.assert_allclose(top, expected, rtol=1e-4)


def test_pages_show_every_token_with_its_value(small: Small, made: Path) -> None:
    assert sorted(path.name for path in (made / "features").iterdir()) == sorted(f"{n}.html" for n in NUMBERS)
    rows = pq.read_table(made / "activations.parquet").to_pylist()
    n_intervals = 0
    for i, number in enumerate(NUMBERS):
        seen = Page(made / f"features/{number}.html")
        assert seen.links.get("prev") == (f"{NUMBERS[i - 1]}.html" if i else None)
        assert seen.links.get("next") == (f"{NUMBERS[i + 1]}.html" if i + 1 < len(NUMBERS) else None)
        assert not seen.tags & {"img", "iframe"}
        mine = [row for row in rows if row["feature_index"] == number]
        assert len(seen.contexts) == len(mine)
        for context, row in zip(seen.contexts, mine, strict=True):
            shown = [(text, float(value)) for text, value, _ in context if value is not None]
            assert [text for text, _ in shown] == [as_shown(token) for token in row["tokens"]]
            np.testing.assert_allclose([value for _, value in shown], row["values"], rtol=6e-3)
            own = [j for j, (_, _, is_own) in enumerate(context) if is_own]
            assert own == [row["qualifying_token_index"]]
        ends = {(row["bin_min"], row["bin_max"]) for row in mine if row["bin_min"] >= 0}
        intervals = [heading for heading in seen.headings if "of rows" in heading]
        assert intervals == [
            f"{low:.4g} to {high:.4g}: {share:.3%} of rows"
            for low, high, share in sorted(
                {
                    (row["bin_min"], row["bin_max"], row["bin_contains"])
                    for row in mine
                    if row["bin_min"] >= 0
                },
                reverse=True,
            )
        ]
        assert len(ends) == len(intervals)
        n_intervals += len(intervals)
    assert n_intervals > 20


def index_of(folder: Path) -> Any:
    text = (folder / "index.html").read_text(encoding="utf-8")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(data)


def test_index_holds_a_row_for_each_feature(small: Small, made: Path) -> None:
    index = index_of(made)
    flat = small.features.reshape(-1, 12)[:, NUMBERS]
    assert [row[0] for row in index["rows"]] == NUMBERS
    np.testing.assert_allclose([row[1] for row in index["rows"]], (flat > 0).mean(0), rtol=1e-3)
    np.testing.assert_allclose([row[2] for row in index["rows"]], flat.max(0), rtol=1e-3)
    np.testing.assert_array_equal([row[4] for row in index["rows"]], (flat > 0).sum(0))
    for row, number in zip(index["rows"], NUMBERS, strict=True):
        values = small.features[..., number]
        sequences = np.argsort(-values.max(1))[:4]
        best = [small.tokens[s][values[s].argmax()] for s in sequences]
        assert [index["tokens"][token] for token in row[5]] == list(dict.fromkeys(best))


def test_logits_are_those_of_hugging_face(small: Small, made: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(small.model)
    with torch.no_grad():
        gain = model.transformer.ln_f.weight
        directions = torch.from_numpy(small.directions[NUMBERS])
        # LayerNorm takes the mean off.
        centred = directions - directions.mean(1, keepdim=True)
        effects = ((centred * gain) @ model.lm_head.weight.T).numpy()
    table = pq.read_table(made / "features.parquet").to_pydict()
    np.testing.assert_allclose(table["pos_values"], np.sort(effects, 1)[:, ::-1][:, :10], rtol=1e-4)
    np.testing.assert_allclose(table["neg_values"], np.sort(effects, 1)[:, :10], rtol=1e-4)
    best = [small.store.tokenizer.decode([int(token)]) for token in effects.argmax(1)]
    assert [row[0] for row in table["pos_str"]] == best
    assert [
        as_shown(token) in (made / f"features/{n}.html").read_text()
        for n, token in zip(NUMBERS, best, strict=True)
    ]


def test_interrupted_dashboard_goes_on(small: Small, made: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "dashboard")
    options: dict[str, Any] = {"out": out, "k": 4, "before": 6, "after": 3, "resume": str(tmp_path / "kept")}
    options["model"] = actstore.HookedModel.from_pretrained(str(small.model))

    def stop(n_done: int, n_pages: int) -> None:
        assert n_pages == len(NUMBERS)
        if n_done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        analysis.dashboard(small.store, HOOK, small.directions, NUMBERS, on_page=stop, **options)
    assert not (tmp_path / "dashboard/index.html").exists()
    n_left = len(list((tmp_path / "dashboard/features").iterdir()))
    again = analysis.dashboard(small.store, HOOK, small.directions, NUMBERS, **options)
    assert again.n_pages_before == n_left >= 2
    for path in made.rglob("*"):
        if path.suffix in (".html", ".parquet"):
            assert (tmp_path / "dashboard" / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    third = analysis.dashboard(small.store, HOOK, small.directions, NUMBERS, **options)
    assert "is complete already" in str(third)


@pytest.mark.parametrize(
    "changes",
    [{"k": 5}, {"seed": 1}, {"drop": [5]}, {"features": [1]}, {"W_U": torch.ones(64, 5)}],
    ids=lambda changes: next(iter(changes)),
)
def test_folder_of_another_dashboard_is_refused(small: Small, made: Path, changes: dict[str, Any]) -> None:
    options: dict[str, Any] = {"features": NUMBERS, "k": 4, "before": 6, "after": 3, "n_logits": 3}
    with pytest.raises(StorageError, match="holds a dashboard of other features"):
        analysis.dashboard(small.store, HOOK, small.directions, out=str(made), **(options | changes))


def test_features_of_other_numbers_are_another_dashboard(small: Small, tmp_path: Path) -> None:
    """The same directions, as the first features and as the fourth and fifth, have pages of other names."""
    options: dict[str, Any] = {"out": str(tmp_path / "dashboard"), "k": 1, "n_samples": 0}
    analysis.dashboard(small.store, HOOK, small.directions, [3, 4], **options)
    with pytest.raises(StorageError, match="holds a dashboard of other features"):
        analysis.dashboard(small.store, HOOK, small.directions[3:5], **options)


def test_folder_of_something_else_is_refused(small: Small, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StorageError, match=r"holds thesis\.tex and no dashboard"):
        analysis.dashboard(small.store, HOOK, small.directions, out=str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_scan_that_failed_leaves_the_folder_to_others(small: Small, tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    out = str(tmp_path / "dashboard")
    with pytest.raises(KeyboardInterrupt):
        analysis.dashboard(small.store, HOOK, [1], out=out, on_progress=stop)
    assert analysis.dashboard(small.store, HOOK, [2], out=out).n_pages_before == 0
    about = json.loads((tmp_path / "dashboard/dashboard.json").read_text())
    assert (about["hook"], about["store"]) == (HOOK, "store"), "no path of this machine"


def test_functions_are_not_taken_for_each_other(small: Small, tmp_path: Path) -> None:
    out = str(tmp_path / "dashboard")
    made = analysis.dashboard(small.store, HOOK, lambda rows: rows[:, :2], out=out)
    assert made.n_features == 2
    with pytest.raises(StorageError, match="other features"):
        analysis.dashboard(small.store, HOOK, lambda rows: rows[:, :2], out=out)


def test_tokens_that_were_left_out_have_no_value(small: Small, tmp_path: Path) -> None:
    analysis.dashboard(
        small.store, HOOK, [3], out=str(tmp_path / "d"), seqpos=slice(4, None), before=5, after=0
    )
    rows = pq.read_table(tmp_path / "d/activations.parquet").to_pylist()
    left_out = [
        value
        for row in rows
        for value, position in zip(
            row["values"],
            range(row["position"] - row["qualifying_token_index"], row["position"] + 1),
            strict=True,
        )
        if position < 4
    ]
    assert left_out
    assert set(left_out) == {None}


def test_latents_of_saelens(small: Small, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        from sae_lens import StandardSAE, StandardSAEConfig

    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=24))
    matrix = torch.randn(64, 30)
    analysis.dashboard(small.store, HOOK, sae, range(3, 9), out=str(tmp_path / "d"), W_U=matrix, n_logits=2)
    table = pq.read_table(tmp_path / "d/features.parquet").to_pydict()
    with torch.no_grad():
        latents = sae.encode(torch.from_numpy(small.values)).flatten(0, 1).numpy()[:, 3:9]
        effects = (sae.W_dec[3:9] @ matrix).numpy()
    assert table["feature_index"] == list(range(3, 9))
    np.testing.assert_allclose(table["frac_nonzero"], (latents > 0).mean(0))
    np.testing.assert_allclose(table["max_activation"], latents.max(0), rtol=1e-4)
    np.testing.assert_allclose(table["pos_values"], np.sort(effects, 1)[:, ::-1][:, :2], rtol=1e-4)


@pytest.mark.parametrize(
    ("of", "options", "says"),
    [
        (np.ones((4, 64), np.float32), {"features": [4]}, "feature 4 was chosen, and there are 4"),
        (np.ones((4, 64), np.float32), {"features": []}, "with one at least"),
        (np.ones((4, 64), np.float32), {"features": [-1]}, "from 0"),
        ([3, 5], {"features": [4]}, "none of the neurons"),
        (lambda rows: rows, {"features": [4]}, "features of a function cannot be chosen"),
        (lambda rows: rows, {"W_U": torch.ones(64, 5)}, "have no directions"),
        (np.ones((4, 64), np.float32), {"W_U": torch.ones(32, 5)}, "do not write to the residual stream"),
        (np.ones((4, 64), np.float32), {"n_intervals": 128}, "from 1 to 64"),
        (np.ones((4, 64), np.float32), {"n_logits": 0}, "n_logits is 0"),
    ],
    ids=["beyond", "none", "negative", "neuron", "function", "no directions", "width", "intervals", "logits"],
)
def test_arguments_that_are_not_valid(
    small: Small, tmp_path: Path, of: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(JobError, match=says):
        analysis.dashboard(small.store, HOOK, of, out=str(tmp_path / "dashboard"), **options)
    assert not (tmp_path / "dashboard").exists()


def test_store_without_text_is_named(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", np.ones((9, 8, 16), np.float32))
    with pytest.raises(TokensError, match="tokens without a text"):
        analysis.dashboard(store, store.hooks[0], [0], out=str(tmp_path / "dashboard"))
    assert not (tmp_path / "dashboard").exists()


def test_dashboard_on_s3(small: Small, s3_url: str) -> None:
    import fsspec

    analysis.dashboard(small.store, HOOK, [0, 2], out=f"{s3_url}/dashboard")
    names = fsspec.filesystem("s3").find(f"{s3_url}/dashboard")
    assert sum(name.endswith(".html") for name in names) == 3


def test_evil_tokens_are_in_the_pages(made: Path) -> None:
    """Otherwise the tests of what they do would show nothing."""
    import html

    text = "".join(path.read_text(encoding="utf-8") for path in (made / "features").iterdir())
    for token in EVIL[:3]:
        assert html.escape(token) in text
        assert token not in text


def test_data_of_a_page_cannot_end_its_element() -> None:
    made = page("title", "", "", json.dumps([*EVIL, "<!--<script>"])).decode()
    (held,) = re.findall(r'id="data">(.*?)</script>', made, re.DOTALL)
    assert json.loads(held) == [*EVIL, "<!--<script>"]
    assert "<" not in held
