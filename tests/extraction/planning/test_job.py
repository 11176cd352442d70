"""Jobs: from YAML and keywords, with every problem reported at once."""

from pathlib import Path
from typing import Any

import pytest

from actstore.errors import JobError, StorageError
from actstore.extraction.planning.job import load_job, parse_job

GOOD: dict[str, Any] = {
    "model": "gpt2",
    "tokens": "text.txt",
    "hooks": ["blocks.*.hook_resid_post"],
    "context_length": 128,
    "out": "run",
}


def test_hooks_are_a_list_or_separated_by_commas() -> None:
    assert parse_job(GOOD).hook_patterns == ("blocks.*.hook_resid_post",)
    assert parse_job(GOOD | {"hooks": "a, b"}).hook_patterns == ("a", "b")


def test_all_problems_are_told_at_once_with_their_location() -> None:
    wrong = GOOD | {
        "context_length": "long",
        "dtype": "float8",
        "modle": "gpt2",
        "begin_batch_token": "start",
    }
    del wrong["out"]
    with pytest.raises(JobError) as caught:
        parse_job(wrong, where="job.yaml")
    text = str(caught.value)
    assert text.startswith("job.yaml: 5 problems: ")
    for line in (
        "context_length: should be a number of tokens, 1 or more, or 'auto', got 'long'",
        "dtype: input should be 'bfloat16', 'float16' or 'float32', got 'float8'",
        "modle: is not a field of a job (the nearest is model)",
        "begin_batch_token: should be a token id, 'bos', 'eos', 'sep', 'pad' or 'none', got 'start'",
        "out: is required",
    ):
        assert line in text.split(": ", 2)[2].split("; ")


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "128", None, [128]])
def test_context_length_is_a_positive_integer(value: object) -> None:
    with pytest.raises(JobError, match="1 problem: context_length: "):
        parse_job(GOOD | {"context_length": value})


def test_a_yaml_file_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(
        "model: gpt2\ntokens: text.txt\nhooks: [blocks.0.hook_mlp_out]\ncontext_length: 64\nout: a\n"
    )
    job = load_job(str(file), {"out": "b"})
    assert (job.out, job.context_length, job.hook_patterns) == ("b", 64, ("blocks.0.hook_mlp_out",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: [1", "is not valid YAML", id="broken"),
        pytest.param("- a", "must hold a mapping", id="a list"),
        pytest.param("", "must hold a mapping", id="empty"),
    ],
)
def test_a_file_that_holds_no_job(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(JobError, match=message) as caught:
        load_job(str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_job_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"job file cannot be read: .*none\.yaml does not exist"):
        load_job(str(tmp_path / "none.yaml"))
