"""``actstore demo``, as a newcomer sees it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread

import actstore
from actstore.cli.commands.demo import residual_norms
from tests.commands import command as run_command
from tests.commands import command_here


def test_demo(tmp_path: Path) -> None:
    command = [str(Path(sys.executable).parent / "actstore"), "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for part in ("51,200 in 400 sequences of 128", "complete: ", "tokens/s", "actstore.open(", "Next:"):
        assert part in done.stdout
    store = actstore.open(str(tmp_path / "demo/store"))
    assert store.is_complete
    norms = residual_norms(store, 8, slice(19, 51))
    everywhere = [store[hook][:].double().norm(dim=-1) for hook in store.hooks]
    by_torch = [(of_layer[8, 19:51] / of_layer.mean()).numpy() for of_layer in everywhere]
    assert np.allclose(norms, by_torch, rtol=1e-6)
    picture = imread(tmp_path / "demo/residual-norms.png")
    assert picture.shape[1] > 1000
    assert picture.std() > 0.05  # not a blank page

    assert "nothing to do" in command_here(*command[1:]).stdout


def test_without_matplotlib_there_is_no_picture(tmp_path: Path) -> None:
    """Everything else is there, and one sentence says what to install."""
    code = (
        "import sys\nsys.modules['matplotlib'] = None  # an import of it fails as if it were not installed\n"
        f"from actstore.cli.main import run\nsys.exit(run(['demo', '--out', {str(tmp_path)!r}]))"
    )
    done = run_command(code=code)
    assert done.returncode == 0, done.stderr
    assert "No picture: drawing needs the extra 'plot'; pip install 'actstore[plot]'" in done.stdout
    assert "Next:" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store"]
