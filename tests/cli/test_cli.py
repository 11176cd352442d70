"""The command line as users meet it: exit codes, one-sentence errors, output that can be piped."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import actstore
from actstore.errors import HookError
from actstore.storage.local import LocalBlobs
from tests.commands import command, command_here
from tests.store.example import example_plan
from tests.store.runs import write_run

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def extracted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("extracted") / "store"


@pytest.fixture
def store(fields: Fields, extracted: Path) -> actstore.Store:
    """A complete store in bfloat16, extracted once. No test here writes to it."""
    if not extracted.exists():
        actstore.extract(actstore.plan(**fields | {"out": str(extracted)}, dtype="bfloat16"))
    return actstore.open(str(extracted))


def test_extract_with_options(fields: Fields, options: list[str]) -> None:
    done = command("extract", *options)
    assert done.returncode == 0, done.stderr
    assert "3,200 in 100 sequences of 32" in done.stderr  # the plan, before anything starts
    assert "extracted 100%: 100 of 100 sequences" in done.stderr
    assert "tokens/s" in done.stderr
    assert "MB/s" in done.stderr
    for part in (
        "complete: 7 segments",
        "3,200 stored",
        "tokenising",
        "in the forward",
        "waiting for writes",
    ):
        assert part in done.stdout
    again = command_here("extract", *options, "--json", "--quiet")
    assert again.stderr == ""
    report = json.loads(again.stdout)
    assert (report["n_segments_before"], report["n_tokens_computed"]) == (7, 0)
    assert actstore.open(fields["out"]).is_complete


def test_extract_with_a_job_file(fields: Fields, tmp_path: Path) -> None:
    import yaml

    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(fields | {"out": "relative"}))
    done = command("extract", str(job), "--dtype", "float16", "--json", "--quiet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["n_tokens_computed"] == 3200
    assert actstore.open(str(tmp_path / "relative")).plan.request.dtype == "float16"


def test_problems_of_a_job_come_all_at_once() -> None:
    done = command("extract", "--model", "gpt2", "--context-length", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        (
            "error: job: 4 problems: tokens: is required; hooks: is required; "
            "context_length: should be a number of tokens, 1 or more, or 'auto', got 0; out: is required"
        )
    ]


def test_an_error_is_one_line_and_debug_shows_where(options: list[str], tmp_path: Path) -> None:
    wrong = ("extract", *options, "--hooks", "blocks.9.hook_resid_post")
    done = command(*wrong)
    assert done.returncode == 1
    assert (
        done.stderr
        == "error: hook 'blocks.9.hook_resid_post' matches nothing: this model has layers 0 to 2\n"
    )
    with pytest.raises(HookError, match="matches nothing"):
        command_here(*wrong, "--debug")
    assert "Traceback" in command("info", str(tmp_path), "--debug").stderr


@pytest.mark.parametrize(
    ("option", "value", "given"),
    [("--num-workers", "2", "num_workers is 2"), ("--ray-address", "auto", "ray_address is auto")],
)
def test_workers_are_refused_without_ray(
    fields: Fields, options: list[str], option: str, value: str, given: str
) -> None:
    done = command_here("extract", *options, option, value, "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {given}, and executor inline is this one process")
    assert not Path(fields["out"]).exists()


def test_plan_is_a_dry_run(fields: Fields, options: list[str]) -> None:
    done = command_here("plan", *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_segments"] == 7
    assert not Path(fields["out"]).exists()


def test_info(store: actstore.Store) -> None:
    text = command("info", store.url).stdout
    assert "complete: 7 of 7 segments" in text
    assert "[100, 32, 64] bfloat16" in text
    fields = json.loads(command("info", store.url, "--json").stdout)
    assert fields["complete"] is True
    assert list(fields["hooks"]) == list(store.hooks)
    assert fields["plan"] == store.metadata


def test_info_says_which_hook_has_which_shape(tmp_path: Path) -> None:
    write_run(LocalBlobs(tmp_path), example_plan())
    lines = command("info", str(tmp_path)).stdout.splitlines()
    stored = actstore.open(str(tmp_path))
    width = max(len(name) for name in stored.hooks)
    shown = [f"{name:<{width}}  {list(stored[name].shape)}" for name in stored.hooks]
    assert [line[9:] for line in lines[-len(shown) :]] == shown
    assert any(line.startswith("arrays   float32, ") for line in lines)


def test_info_where_there_is_no_store(tmp_path: Path) -> None:
    done = command("info", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: there is no actstore store at {tmp_path}")


def test_slice_as_npy_and_safetensors(store: actstore.Store, tmp_path: Path) -> None:
    hook = "blocks.1.hook_mlp_out"
    want = store[hook][2:4, 5:]
    npy, tensors = tmp_path / "a.npy", tmp_path / "a.safetensors"
    common = ("slice", store.url, hook, "--seq", "2:4", "--pos", "5:")
    assert command_here(*common, "--format", "npy", "-o", str(npy)).returncode == 0
    assert torch.equal(torch.from_numpy(np.load(npy, allow_pickle=False)), want.float())
    assert command_here(*common, "--format", "safetensors", "-o", str(tensors)).returncode == 0
    saved = load_file(tensors)
    assert saved[hook].dtype == torch.bfloat16
    assert torch.equal(saved[hook], want)
    assert np.array_equal(saved["tokens"].numpy(), store.tokens[2:4, 5:])


def test_the_suffix_decides_the_format(store: actstore.Store, tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    assert command("slice", store.url, "blocks.1.hook_mlp_out", "-o", str(file)).returncode == 0
    assert np.load(file, allow_pickle=False).shape == (1, 32, 64)
    missing = command("slice", store.url, "blocks.1.hook_mlp_out", "-o", str(tmp_path / "no" / "a.npy"))
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


def test_hooks_can_be_repeated(options: list[str]) -> None:
    hooks = options.index("--hooks")
    options[hooks + 1] = "blocks.0.hook_mlp_out"
    done = command_here(
        "plan", *options, "--hooks", "blocks.2.hook_attn_out", "--executor", "inline", "--json"
    )
    assert json.loads(done.stdout)["hooks"] == ["blocks.0.hook_mlp_out", "blocks.2.hook_attn_out"], (
        done.stderr
    )


def test_slice_as_text(store: actstore.Store) -> None:
    lines = command(
        "slice", store.url, "blocks.0.hook_resid_post", "--seq", "7", "--pos", "-2:"
    ).stdout.splitlines()
    assert len(lines) == 4
    sequence, position, token, norm = lines[-1].split()[:4]
    assert (int(sequence), int(position), int(token)) == (7, 31, int(store.tokens[7, 31]))
    assert float(norm) == pytest.approx(store["resid_post", 0][7, 31].double().norm().item(), abs=1e-3)


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("--seq", "200:300"), 1, "the slice is empty; the store has sequences 0:100 and positions 0:32"),
        (("--seq", "a:b"), 2, "'a:b' is not a range"),
    ],
)
def test_slices_that_make_no_sense(
    store: actstore.Store, args: tuple[str, ...], code: int, message: str
) -> None:
    done = command("slice", store.url, "blocks.0.hook_resid_post", *args)
    assert done.returncode == code
    assert message in done.stderr


def test_slice_of_a_hook_that_is_not_there(store: actstore.Store) -> None:
    done = command_here("slice", store.url, "blocks.0.hook_attn_out")
    assert done.returncode == 1
    assert "does not hold 'blocks.0.hook_attn_out'; it holds blocks.*.hook_resid_post" in done.stderr


@pytest.mark.parametrize(
    "args", [["--help"], ["extract", "--help"], ["info", "STORE"], ["slice", "STORE", "HOOK"]]
)
def test_torch_is_not_imported_where_it_is_not_needed(store: actstore.Store, args: list[str]) -> None:
    given = [{"STORE": store.url, "HOOK": store.hooks[0]}.get(arg, arg) for arg in args]
    code = (
        "import sys; from actstore.cli.main import run\n"
        f"assert run({given!r}) == 0\n"
        "heavy = {'torch', 'transformers', 'ray', 'zarr', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
