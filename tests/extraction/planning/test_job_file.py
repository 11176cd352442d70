"""Job files that do harm, on purpose or by accident: an error of one sentence, in seconds, in little memory."""

import itertools
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from actstore.errors import JobError
from actstore.extraction.planning.job import load_job, parse_job

GOOD = "model: gpt2\ntokens: a.txt\nhooks: [a]\ncontext_length: 64\nout: a\n"
LEVELS = "abcdefghi"
LAUGHS = "a: &a [x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in itertools.pairwise(LEVELS)
)
MERGES = "a: &a {x: y}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 9)}]}}\n" for old, new in itertools.pairwise(LEVELS)
)
BAD = {
    "aliases that expand": (LAUGHS, "holds more than 20,000 values"),
    "merges that expand": (MERGES, "holds more than 20,000 values"),
    "list in itself": ("hooks: &a [*a]\n", "holds more than 20,000 values"),
    "mapping in itself": ("hooks: &a {b: *a}\n", "holds more than 20,000 values"),
    "merge of itself": ("hooks: &a {<<: *a}\n", "holds more than 20,000 values"),
    "root in itself": ("&a [*a]\n", "holds more than 20,000 values"),
    "deep list": ("hooks: " + "[" * 50_000, "has values nested too deep"),
    "deep blocks": ("- " * 50_000, "has values nested too deep"),
    "deep mapping": ("hooks: " + "{a: " * 50_000, "has values nested too deep"),
    "large": (GOOD + "#" * (1 << 20), "and a job file has at most 262144"),
    "many values": ("hooks: [" + "a," * 50_000 + "]", "holds more than 20,000 values"),
    "long number": ("context_length: " + "9" * 5000, "is not valid YAML: Exceeds the limit"),
    "no day": ("model: 2024-99-99", "is not valid YAML: month must be in 1..12"),
    "no list's end": ("hooks: [a\n", "(line 2, column 1)"),
    "tag of Python": ("model: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
    "two documents": (GOOD + "---\n" + GOOD, "is not valid YAML: but found another document"),
    "binary": ("\x00\x01", "is not valid YAML"),
    "field twice": ("model: a\nout: b\nmodel: c\n", "has 'model' a second time in line 3; leave one of them"),
    "glob without quotes": ("hooks: [*.hook_resid_post]\n", "put names that begin with * in quotes"),
    "date as a key": ("hooks: {2024-01-01: a}", "has a value that no field can have: keys must be str"),
}


@pytest.mark.parametrize("kind", BAD)
def test_job_file_that_is_none(tmp_path: Path, kind: str) -> None:
    text, message = BAD[kind]
    file = tmp_path / "job.yaml"
    file.write_text(text)
    started = time.monotonic()
    with pytest.raises(JobError) as caught:
        load_job(str(file))
    assert time.monotonic() - started < 10
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{file} ")
    assert len(str(caught.value)) < 500 + len(str(file))


@pytest.mark.parametrize("kind", ["aliases that expand", "merges that expand", "mapping in itself"])
def test_job_file_of_a_process_with_little_memory(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(BAD[kind][0])
    code = (
        "import sys\nfrom actstore.errors import JobError\nfrom actstore.extraction.planning.job import load_job\n"
        "try:\n    load_job(sys.argv[1])\nexcept JobError as error:\n    print(error)"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (400 << 20,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (30, 30))

    ended = subprocess.run(
        [sys.executable, "-c", code, file], preexec_fn=limit, capture_output=True, text=True, check=True
    )
    assert "holds more than 20,000 values" in ended.stdout


def test_aliases_of_a_few_values_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text("model: &name gpt2\ntokens: a.txt\nhooks: &a [a, b]\ncontext_length: 64\nout: *name\n")
    job = load_job(str(file))
    assert (job.out, job.hooks) == ("gpt2", ("a", "b"))


def test_values_of_python_that_no_field_can_have() -> None:
    endless: list[object] = []
    endless.append(endless)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep, 10**5000, {(1, 2): 3}, float("nan"), "\ud800", b"x", object()):
        with pytest.raises(JobError) as caught:
            parse_job({"model": "gpt2", "tokens": "a", "hooks": value, "context_length": 8, "out": "a"})
        assert len(str(caught.value)) < 500
