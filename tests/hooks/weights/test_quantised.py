"""Models whose weights a package has quantised: right hooks, and no weight that the forward does not use."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import packages

TinyModel = Callable[..., Path]
SCRIPT = Path(__file__).parent / "quantised.py"


@pytest.mark.parametrize(
    ("package", "kind"),
    [("torchao", "Int8Tensor"), ("bitsandbytes", "Int8Params")],
    ids=["torchao", "bitsandbytes"],
)
def test_int8_weights(tiny_model: TinyModel, tmp_path: Path, package: str, kind: str) -> None:
    if package == "bitsandbytes" and importlib.util.find_spec(package) is None:
        pytest.skip("bitsandbytes is not installed; it is too large to be fetched for one test")
    path = os.environ.get("PYTHONPATH", "")
    if package == "torchao":
        try:
            # transformers imports it with every model if it can, and it writes to stderr then.
            path = f"{packages.package('torchao==0.18.0')}{os.pathsep}{path}"
        except OSError as error:
            pytest.skip(str(error))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tiny_model("llama")), package, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert kind in result["kinds"]
    assert result["is_equal"]
    assert result["again"], "saved and loaded, it gives other values"
    assert result["fingerprints"][0] != result["fingerprints"][1]
    shown = {view for view, outcome in result["views"].items() if outcome == "there"}
    assert shown == {"W_U", "W_E"}  # which transformers leaves as they are
    for view in result["views"].keys() - shown:
        assert f"keeps its weight as {kind}, which is no matrix of numbers" in result["views"][view]
