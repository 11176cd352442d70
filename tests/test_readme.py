"""The examples of the README, run as they stand; only names of places are replaced by existing ones."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

import actstore
from actstore.cli.main import cli
from tests.commands import command
from tests.docs.test_hooks_pages import assert_shown
from tests.query.running import running

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def examples(page: str) -> dict[str, str]:
    """The Python code of each section of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sections = {title: "\n".join(BLOCK.findall(body)) for title, body in SECTION.findall(text)}
    return {title: code for title, code in sections.items() if code}


def run(code: str, folder: Path) -> str:
    """Run an example in a new process; returns what it prints."""
    code = f"import warnings\nwarnings.simplefilter('ignore')\n{code}"
    done = command(code=code, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def section(title: str) -> str:
    """The text of a section of the README."""
    sections: dict[str, str] = dict(SECTION.findall((ROOT / "README.md").read_text(encoding="utf-8")))
    return sections[title]


def run_shell(line: str, folder: Path) -> None:
    """Run a shell line with the commands of this environment."""
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=False,
    )
    assert done.returncode == 0, line + done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which ``actstore demo`` has run."""
    folder = tmp_path_factory.mktemp("demo")
    done = command("demo", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_example_is_run_here() -> None:
    assert set(examples("README.md")) == {
        "Quickstart",
        "Train an SAE",
        "Analyse",
        "Serve",
        "Look inside and patch",
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCK.findall(text)) == 5
    install, extract = SHELL.findall(text)
    assert install == SHELL.findall(section("Install"))[0]
    assert extract == SHELL.findall(section("Extract at scale"))[0]


def test_quickstart(tmp_path: Path) -> None:
    shown = SHOWN.findall(section("Quickstart"))[0]
    assert_shown(run(examples("README.md")["Quickstart"], tmp_path), shown)


@pytest.mark.ray
@pytest.mark.s3
def test_extract_and_read(smollm2: Path, text_file: Path, s3_url: str, tmp_path: Path) -> None:
    line = SHELL.findall(section("Extract at scale"))[0]
    (code,) = BLOCK.findall((ROOT / "docs/extract.md").read_text(encoding="utf-8"))
    places = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(smollm2),
        "corpus.jsonl": str(text_file),
        "s3://my-bucket/store": s3_url,
    }
    for name, place in places.items():
        assert name in line
        assert name in code
        line, code = line.replace(name, place), code.replace(name, place)
    # CPUs without bfloat16 emulate it, and a batch is always complete: 4,096 tokens by default.
    assert "--max-tokens 16_384" in line
    assert "max_tokens=16_384" in code
    line = line.replace("--max-tokens 16_384", "--max-tokens 256 --batch-size 1 --segment-size 1")
    code = code.replace("max_tokens=16_384", "max_tokens=256, batch_size=1, segment_size=1")
    _, *arguments = shlex.split(line.replace("\\\n", ""))
    done = command(*arguments, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "256 in 2 sequences of 128" in done.stderr + done.stdout
    assert f"{s3_url} (complete: 2 segments)" in done.stdout
    grown = run(code, tmp_path)
    assert "complete: " in grown
    store = actstore.open(s3_url)
    assert len(store.hooks) == 60
    for hook in ("blocks.14.hook_resid_post", "blocks.14.hook_mlp_out"):
        assert store[hook][0:8, -1].isfinite().all()


@pytest.mark.s3
def test_train_an_sae(demo: Path, s3_url: str, tmp_path: Path) -> None:
    """From S3, where the cache matters. `tests.query.test_conformance` compares batches from there and from disk."""
    code, place = examples("README.md")["Train an SAE"], "actstore-demo/store"
    assert place in code
    files = fsspec.filesystem("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    files.put(str(demo / place), s3_url, recursive=True)
    printed = run(code.replace(place, s3_url), tmp_path)
    (explained,) = map(float, re.findall(r"^sae +(0\.\d+)", printed, re.MULTILINE))
    (promised,) = map(float, re.findall(r"# explains (0\.\d+) of the variance", code))
    assert explained == pytest.approx(promised, abs=0.05)
    assert (tmp_path / "sae/sae_weights.safetensors").is_file()
    assert any((tmp_path / "cache").rglob("c.*"))


def test_analyse(demo: Path) -> None:
    assert_shown(run(examples("README.md")["Analyse"], demo), SHOWN.findall(section("Analyse"))[0])


def test_serve(demo: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:8000"
    page = (ROOT / "docs/serve.md").read_text(encoding="utf-8")
    curls = re.findall(r"`(curl .*?)`", section("Serve"))
    assert len(curls) == 1
    with running(tmp_path, str(demo / "actstore-demo/store")) as server:
        printed = run(examples("README.md")["Serve"].replace(url, server.url), tmp_path)
        shown = run("\n".join(BLOCK.findall(page)).replace(url, server.url), tmp_path)
        for line in curls + re.findall(r"^curl .*(?:\\\n.*)*", page, re.MULTILINE):
            run_shell(line.replace(url, server.url), tmp_path)
    assert_shown(printed.replace(server.url, url), SHOWN.findall(section("Serve"))[0])
    before, *after = map(float, re.findall(r"tensor\(([\d.e+-]+)\)", shown))
    assert after[0] < 0.9 * before
    assert (tmp_path / "sae-over-http/sae_weights.safetensors").is_file()


def test_patch(demo: Path) -> None:
    title = "Look inside and patch"
    printed = run(examples("README.md")[title], demo)
    assert_shown(printed, SHOWN.findall(section(title))[0])
    shares = [[float(share) for share in line.split()[1:]] for line in printed.splitlines()]
    assert shares[0] == [0, 1, 0, 0]  # before layer 0 nothing has read the wrong token yet
    assert all(0.1 < at_40 < 0.9 for _, at_40, *_ in shares[1:])


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
    later = [examples("docs/hooks.md")[title] for title in ("Gradients", "Generation", "A part of a forward")]
    checks = """
assert heads.shape[0] == 270 and kept[0].shape == (1, 7, 576)
assert cache["pattern", 3].shape == (1, 9, 12, 12) == (1, 9, tokens.shape[1], tokens.shape[1])
assert steered != "The cat sat on" and steered.startswith("The cat sat on")
"""
    run("\n".join([code, *later]).replace(name, str(smollm2)) + checks, tmp_path)


def test_hooks_page_names_every_family() -> None:
    from actstore.hooks.families.architectures import ARCHITECTURES

    page = (ROOT / "docs/hooks.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in page for family in ARCHITECTURES)
