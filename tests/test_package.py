"""The package as a whole: its public names, its imports, the content of its wheel."""

import ast
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import actstore
from actstore.storage.local import LocalBlobs
from tests.loader.stores import finished
from tests.store.example import HOOKS, LENGTH, example_plan

ROOT = Path(__file__).parents[1]


def test_public_names() -> None:
    assert actstore.__all__ == sorted(actstore.__all__)
    assert set(actstore.__all__) == {
        "ActivationCache", "Activations", "FactoredMatrix", "HookedModel", "Job", "PlannedRun", "Report",
        "Statistics", "Store", "Verification", "__version__", "activations", "extract", "open", "plan", "utils",
        "verify",
    }  # fmt: skip
    for name in actstore.__all__:
        assert getattr(actstore, name) is not None


def imported(text: str) -> set[str]:
    """Names of all modules that a file may import, in any way; for ``from a import b`` that includes ``a.b``.

    Relative imports are ignored: ruff refuses those that lead up.
    """
    modules: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, text
            modules |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            modules |= {str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)}
    return modules


def test_every_way_to_import_is_seen() -> None:
    text = (
        "import a.b as c, d\nfrom e.f import g\n\ndef h():\n    from i import j\n    import_module('k.l')\n"
    )
    assert imported(text) == {"a.b", "d", "e.f", "e.f.g", "i", "i.j", "k.l"}


@pytest.mark.parametrize("package", ["actstore", "actstore.analysis"])
def test_no_name_is_that_of_a_module_too(package: str) -> None:
    """Names are imported on first use. A module that is imported before would be in the place of the function."""
    folder = ROOT / package.replace(".", "/")
    modules = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert not set(import_module(package).__all__) & modules - {"utils"}


def test_actstore_never_imports_ray() -> None:
    for path in (ROOT / "actstore").rglob("*.py"):
        names = {name.split(".")[0] for name in imported(path.read_text())}
        assert not names & {"ray", "actstore_workers"}, path


def test_a_store_is_read_without_torch_and_transformers(tmp_path: Path) -> None:
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan("float32"))
    code = (
        "import sys, actstore\n"
        f"store = actstore.open({store.url!r})\n"
        f"print(store[{HOOKS[0]!r}].numpy(slice(0, 2)).view('uint32').tolist(), store.tokens[0:2].shape)\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'ray') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, heavy = done.stdout.splitlines()
    assert rows == f"{values[HOOKS[0]][0:2].view('uint32').tolist()} (2, {LENGTH})"
    assert heavy == "[]"


def test_a_server_needs_torch_for_batches_alone(tmp_path: Path) -> None:
    """Importing torch takes longer than all else at the start of a server."""
    store, values = finished(LocalBlobs(tmp_path / "store"), example_plan("float32"))
    code = (
        "import sys\n"
        "from tests.query.in_process import App\n"
        f"app = App(stores={{'run': {store.url!r}}})\n"
        f"hook = 'run/hooks/{HOOKS[0]}'\n"
        "print(app.ask(f'{hook}/slice?seq=0:2').content.hex())\n"
        "for form in ('safetensors', 'npy', 'arrow', 'json'):\n"
        "    assert app.ask(f'{hook}/slice?seq=0:2&format={form}').status_code == 200, form\n"
        "for path in ('run', f'{hook}/stats', 'run/prompts?tokens=1', 'run/zarr/zarr.json'):\n"
        "    assert app.ask(path).status_code == 200, path\n"
        "print('torch' in sys.modules)\n"
        f"reply = app.ask('run/batches/0?hook={HOOKS[0]}&batch_size=8')\n"
        "print(reply.status_code, 'torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    data, *loaded = done.stdout.splitlines()
    assert bytes.fromhex(data) == values[HOOKS[0]][0:2].tobytes()
    assert loaded == ["False", "200 True"]


def test_imports_point_down_and_in_no_circle() -> None:
    """The layers are in pyproject.toml; lazy imports and those for types count."""
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_wheel_holds_the_two_packages_and_the_demo(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"actstore", "actstore_workers"}
    assert "actstore/demo/model/model.safetensors" in names
    assert "actstore/demo/text/shakespeare.txt" in names


def test_the_command_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "actstore", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"actstore, version {actstore.__version__}\n"
