"""The examples of the README, run as they stand; only names of places are replaced by what is there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from actstore.cli.main import cli
from tests.commands import command
from tests.query.running import running

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def examples(page: str) -> dict[str, str]:
    """Python of each section of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sections = {title: "\n".join(BLOCK.findall(body)) for title, body in SECTION.findall(text)}
    return {title: code for title, code in sections.items() if code}


def run(code: str, folder: Path) -> str:
    """Run an example in a fresh process; what it prints."""
    code = f"import warnings\nwarnings.simplefilter('ignore')\n{code}"
    done = command(code=code, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``actstore demo`` has run."""
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_example_is_run_here() -> None:
    assert set(examples("README.md")) == {
        "Extract",
        "Read",
        "Train an SAE",
        "Serve",
        "Look inside, and patch",
    }


@pytest.mark.ray
@pytest.mark.s3
def test_extract_and_read(smollm2: Path, text_file: Path, s3_url: str, tmp_path: Path) -> None:
    code = examples("README.md")
    both = code["Extract"] + code["Read"]
    places = {
        "HuggingFaceTB/SmolLM2-135M": str(smollm2),
        "corpus.jsonl": str(text_file),
        # CPUs without bfloat16 emulate it, and a batch is always whole: 4,096 tokens of its own accord.
        "max_tokens=4096": "max_tokens=128, batch_size=1",
        "s3://my-bucket/run": s3_url,
    }
    for name, place in places.items():
        assert name in both
        both = both.replace(name, place)
    shown = run(both, tmp_path)
    assert "128 in 1 sequences of 128" in shown
    assert "complete: " in shown


@pytest.mark.s3
def test_train_an_sae(demo: Path, s3_url: str, tmp_path: Path) -> None:
    code, url = examples("README.md")["Train an SAE"], "s3://my-bucket/run"
    assert url in code
    files = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    files.put(str(demo / "actstore-demo/store"), s3_url, recursive=True)
    places = (s3_url, str(demo / "actstore-demo/store"))
    shown = run("\n".join(code.replace(url, place) for place in places), tmp_path).splitlines()
    assert shown[0] == shown[1]
    found = re.fullmatch(r"fraction of variance unexplained: (0\.\d+)", shown[0])
    assert found is not None
    assert float(found[1]) < 0.5
    assert (tmp_path / "sae/sae_weights.safetensors").is_file()
    assert any((tmp_path / "cache").rglob("c.*"))


def test_serve(demo: Path, tmp_path: Path) -> None:
    code, url = examples("README.md")["Serve"], "http://127.0.0.1:8000"
    with running(tmp_path, str(demo / "actstore-demo/store")) as server:
        shown = run(code.replace(url, server.url), tmp_path)
        page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
        run("\n".join(BLOCK.findall(page)).replace(url, server.url), tmp_path)
        for line in re.findall(r"^curl .*(?:\\\n.*)*", page, re.MULTILINE):
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line.replace(url, server.url)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
                check=False,
            )
            assert done.returncode == 0, line + done.stderr
    before, *after = map(float, re.findall(r"tensor\(([\d.e+-]+)\)", shown))
    assert after[0] < 0.9 * before
    assert (tmp_path / "sae-over-http/sae_weights.safetensors").is_file()


def test_patch(demo: Path) -> None:
    before, after = re.findall(
        r"tensor\(([\d.e+-]+)\)", run(examples("README.md")["Look inside, and patch"], demo)
    )
    assert float(before) > 1
    assert float(after) < 1e-3 * float(before)


def test_reading_page(demo: Path) -> None:
    text = (ROOT / "docs/read.md").read_text(encoding="utf-8")
    run("\n".join(BLOCK.findall(text)), demo)


def test_loader_page(demo: Path) -> None:
    text = (ROOT / "docs/loader.md").read_text(encoding="utf-8")
    run("\n".join(BLOCK.findall(text)), demo)


def test_verify_page(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs/verify.md").read_text(encoding="utf-8")
    run("\n".join(BLOCK.findall(text)), demo)
    monkeypatch.chdir(demo)
    for line in re.findall(r"^actstore verify .*$", text, re.MULTILINE):
        done = CliRunner().invoke(cli, line.split()[1:])
        assert done.exit_code == 0, done.output


def test_hooks_page(smollm2: Path, tmp_path: Path) -> None:
    code = examples("docs/hooks.md")["Models"]
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name in code
    checks = """
assert cache["z", 4].shape == (1, tokens.shape[1], 9, 64)
assert len(gradients) == 30 and all(gradient.abs().max() > 0 for gradient in gradients.values())
assert torch.equal(outside, model(tokens)) and not torch.equal(inside, outside)
"""
    run(code.replace(name, str(smollm2)) + checks, tmp_path)


def test_hooks_page_names_every_hook() -> None:
    from actstore.hooks.point import POINTS

    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    for point in POINTS:
        assert point.leaf.rsplit(".", 1)[-1] in page, point.leaf


def test_hooks_page_names_every_family() -> None:
    from actstore.hooks.architecture import ARCHITECTURES

    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in page for family in ARCHITECTURES)
