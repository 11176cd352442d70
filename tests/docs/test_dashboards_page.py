"""The page on dashboards, run as it stands on the store of the demo."""

from pathlib import Path

import pyarrow.parquet as pq

from actstore.demo import MODEL_PATH
from tests.docs.pages import run_page
from tests.docs.test_hooks_pages import DOCS


def test_dashboards(demo: Path) -> None:
    run_page("dashboards.md", MODEL_PATH)
    assert len(list((demo / "dashboard/features").iterdir())) == 8
    assert len(list((demo / "directions/features").iterdir())) == 20
    # Every column is explained, and no other.
    text = (DOCS / "dashboards.md").read_text(encoding="utf-8")
    for name in ("features", "activations"):
        of_file = pq.read_schema(demo / f"dashboard/{name}.parquet").names
        table = text.partition(f"| column of {name} |")[2].partition("\n\n")[0]
        named = [
            cell
            for line in table.splitlines()
            if line.startswith("| `")
            for cell in line.split("|")[1].split("`")[1::2]
        ]
        assert set(of_file) <= set(named)
        assert set(named) - set(of_file) <= {"pos_str", "pos_values", "neg_str", "neg_values"}
