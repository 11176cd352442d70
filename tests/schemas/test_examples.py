"""The JSON Schema and the Python parser accept and refuse the same examples."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from actstore.errors import ActstoreError, JobError, StorageError
from actstore.extraction.planning.job import load_job, parse_job
from actstore.patching.jobs import job as patching_job
from actstore.store.format.document import Document
from actstore.store.format.plan import Plan
from actstore.store.records.commit import CommitRecord, TokensRecord
from actstore.store.records.manifest import Manifest, RunStatistics

FOLDER = Path(__file__).parents[2] / "schemas"
VALID = sorted((FOLDER / "examples" / "valid").iterdir())
INVALID = sorted((FOLDER / "examples" / "invalid").iterdir())

DOCUMENTS: dict[str, type[Document]] = {
    "plan": Plan,
    "tokens": TokensRecord,
    "commit": CommitRecord,
    "statistics": RunStatistics,
    "manifest": Manifest,
}

JOBS: dict[str, Callable[[str], Any]] = {
    "job": load_job,
    "patchjob": lambda path: patching_job.job_of(path, {}),
}

STRICTER_IN_PYTHON = {
    "job-concat-without-length.yaml": "a schema in which one field decides over another says less to users",
    "job-truncate-of-concat.yaml": "a schema in which one field decides over another says less to users",
    "job-context-length-integral-float.yaml": "to JSON Schema 128.0 is an integer; a count is not written so",
    "plan-checksum-wrong.json": "a schema cannot add up bytes",
    "plan-tokens-of-a-later-run.json": "a schema cannot compare two fields",
    "manifest-file-outside-the-store.json": "a schema cannot compare two fields",
    "manifest-run-twice.json": "a schema cannot compare names within a list",
    "plan-format-a-float.json": "to JSON Schema 1.0 is an integer; the version decides how all else is read",
}
"""Known defects of the parser: a file leaves this list when its defect is fixed."""

_LENGTH = ": 1 problem: context_length: should be a number of tokens, 1 or more, or 'auto', got "
MESSAGES = {
    "job-a-list.yaml": "must hold a mapping of fields, such as 'model: gpt2', not list",
    "job-as-json-unknown-field.json": ": 1 problem: contextLength: is not a field of a job",
    "job-concat-without-length.yaml": ": 1 problem: context_length: is required, as packing: concat joins documents",
    "job-truncate-of-concat.yaml": ": 1 problem: truncate: is for packing: document",
    "job-truncate-unknown.yaml": ": 1 problem: truncate: input should be 'left' or 'right', got 'middle'",
    "job-context-length-a-boolean.yaml": _LENGTH + "True",
    "job-context-length-a-string.yaml": _LENGTH + "'128'",
    "job-context-length-fraction.yaml": _LENGTH + "127.5",
    "job-context-length-integral-float.yaml": _LENGTH + "128.0",
    "job-context-length-zero.yaml": _LENGTH + "0",
    "job-documents-unknown.yaml": (
        ": 1 problem: documents: input should be 'file', 'paragraph' or 'line', got 'sentence'"
    ),
    "job-dtype-unknown.yaml": (
        ": 1 problem: dtype: input should be 'bfloat16', 'float16' or 'float32', got 'float64'"
    ),
    # Each form that hooks can have reports its own problem.
    "job-hooks-a-number.yaml": ": 1 problem: hooks: should be hook names or globs: a list, or "
    "separated by commas, got 5",
    "job-hooks-empty-list.yaml": ": 1 problem: hooks: should be hook names or globs",
    "job-hooks-empty-name.yaml": ": 1 problem: hooks: should be hook names or globs",
    "job-keep-a-number.yaml": ": 1 problem: keep: should be names of columns: a list, or separated by commas, got 3",
    "job-max-tokens-zero.yaml": ": 1 problem: max_tokens: input should be greater than or equal to 1, got 0",
    "job-model-empty.yaml": ": 1 problem: model: string should have at least 1 character, got ''",
    "job-model-missing.yaml": ": 1 problem: model: is required",
    "job-model-null.yaml": ": 1 problem: model: input should be a valid string, got None",
    "job-num-workers-a-string.yaml": ": 1 problem: num_workers: input should be a valid integer, got 'all'",
    "job-packing-unknown.yaml": ": 1 problem: packing: input should be 'concat' or 'document', got 'rows'",
    "job-revision-a-date.yaml": ": 1 problem: revision: ",
    "job-seed-negative.yaml": ": 1 problem: seed: input should be greater than or equal to 0, got -1",
    "job-three-problems.yaml": (
        ": 3 problems: out: is required; "
        "dtype: input should be 'bfloat16', 'float16' or 'float32', got 'fp8'; "
        "hook: is not a field of a job"
    ),
    "job-token-negative.yaml": (
        ": 1 problem: sequence_separator_token: should be a token id, 'bos', 'eos', 'sep', 'pad' or 'none', got -1"
    ),
    "job-token-unknown.yaml": (
        ": 1 problem: begin_batch_token: should be a token id, 'bos', 'eos', 'sep', 'pad' or 'none', got 'start'"
    ),
    "job-unknown-field.yaml": ": 1 problem: hook: is not a field of a job",
    "patchjob-axes-a-number.yaml": ": 1 problem: axes: should be names of axes, such as layer,pos: a list",
    "patchjob-dtype-unknown.yaml": (
        ": 1 problem: dtype: input should be 'float32', 'bfloat16' or 'float16', got 'float64'"
    ),
    "patchjob-max-tokens-null.yaml": ": 1 problem: max_tokens: input should be a valid integer, got None",
    "patchjob-metric-unknown.yaml": (
        ": 1 problem: metric: input should be 'logit_difference', 'logit', 'log_probability' or 'probability', "
        "got 'loss'"
    ),
    "patchjob-pairs-missing.yaml": ": 1 problem: pairs: is required",
    "patchjob-positions-text.yaml": ": 1 problem: positions: should be an integer, or a list of integers, got 'last'",
    "patchjob-unknown-field.yaml": ": 1 problem: hooks: is not a field of a job",
    "plan-checksum-missing.json": "is damaged: it does not begin with its checksum",
    "plan-checksum-wrong.json": " and its content gives ",
    "plan-compression-unknown.json": "is damaged: request.compression: ",
    "plan-hook-outside-the-store.json": "is damaged: request.hooks.0.name: ",
    "plan-layers-without-end.json": "is damaged: request.model.n_layers: ",
    "plan-run-a-number.json": "is damaged: run: ",
    "plan-sequences-without-end.json": "is damaged: n_sequences: ",
    "plan-tokens-of-a-later-run.json": "run 0000 cannot be over the tokens of the later run 0001",
    "manifest-file-outside-the-store.json": "run 0000 names files that are not its own",
    "manifest-format-newer.json": "is of store format 2, and this actstore reads up to 1; upgrade with",
    "manifest-run-twice.json": "its runs are not in order, each once",
    "manifest-sealed-a-string.json": "is damaged: sealed: ",
    "manifest-unknown-field.json": "is damaged: created: ",
    "statistics-bucket-out-of-range.json": "is damaged: hooks.blocks.0.hook_resid_post.norms.buckets.0.0: ",
    "statistics-hooks-missing.json": "is damaged: hooks: Field required",
    "statistics-size-negative.json": "is damaged: hooks.blocks.0.hook_resid_post.sum_of_norms: ",
    "statistics-unknown-field.json": "is damaged: mean: ",
    "commit-count-negative.json": "is damaged: statistics.blocks.0.hook_resid_post.count: ",
    "commit-golden-error-negative.json": "is damaged: golden.errors.blocks.0.hook_resid_post: ",
    "commit-statistics-missing.json": "is damaged: statistics: Field required",
    "plan-a-list.json": "is not an actstore document: it has no integer field 'format'",
    "plan-dtype-unknown.json": "is damaged: request.dtype: ",
    "plan-format-a-boolean.json": "is not an actstore document: it has no integer field 'format'",
    "plan-format-a-float.json": "is not an actstore document: it has no integer field 'format'",
    "plan-format-missing.json": "is not an actstore document: it has no integer field 'format'",
    "plan-format-newer.json": "is of store format 2, and this actstore reads up to 1; upgrade with",
    "plan-format-zero.json": "is damaged: format: ",
    "plan-hooks-empty.json": "is damaged: request.hooks: ",
    "plan-n-layers-a-string.json": "is damaged: request.model.n_layers: ",
    "plan-n-sequences-a-boolean.json": "is damaged: n_sequences: ",
    "plan-no-sequences.json": "is damaged: n_sequences: ",
    "plan-packing-unknown.json": "is damaged: request.tokens.packing: ",
    "plan-seed-missing.json": "is damaged: request.tokens.seed: Field required",
    "plan-segment-size-fraction.json": "is damaged: segment_size: ",
    "plan-unknown-field-inside.json": "is damaged: request.hooks.0.dtype: ",
    "plan-unknown-field.json": "is damaged: created: ",
    "tokens-crc-too-large.json": "is damaged: shards.1.crc32c: ",
    "tokens-format-newer.json": "is of store format 2, and this actstore reads up to 1; upgrade with",
    "tokens-nbytes-negative.json": "is damaged: shards.0.nbytes: ",
    "tokens-shards-missing.json": "is damaged: shards: Field required",
    "tokens-unknown-field.json": "is damaged: shards.0.etag: ",
    "commit-attempt.json": "is damaged: attempt: ",
    "commit-crc-in-hexadecimal.json": "is damaged: shards.blocks.0.hook_resid_post.crc32c: ",
    "commit-crc-too-large.json": "is damaged: shards.blocks.0.hook_resid_post.crc32c: ",
    "commit-environment-missing.json": "is damaged: environment: Field required",
    "commit-format-newer.json": "is of store format 2, and this actstore reads up to 1; upgrade with",
    "commit-no-sequences.json": "is damaged: n_sequences: ",
    "commit-segment-a-string.json": "is damaged: segment: ",
    "commit-segment-negative.json": "is damaged: segment: ",
    "commit-shards-a-list.json": "is damaged: shards: ",
    "commit-time.json": "is damaged: environment.time: ",
}
"""What the parser reports for each invalid example: the place and the problem."""


def _ids(path: Path) -> str:
    return path.name


def _kind(path: Path) -> str:
    return path.name.split("-", 1)[0]


def _fits_schema(path: Path) -> bool:
    schema = json.loads((FOLDER / f"{_kind(path)}.schema.json").read_text(encoding="utf-8"))
    instance = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    return Draft202012Validator(schema).is_valid(instance)


def _parse(path: Path) -> Any:
    if _kind(path) in JOBS:
        return JOBS[_kind(path)](str(path))
    return DOCUMENTS[_kind(path)].from_bytes(path.read_bytes(), path.name)


@pytest.mark.parametrize("path", VALID, ids=_ids)
def test_valid(path: Path) -> None:
    assert _fits_schema(path)
    _parse(path)


@pytest.mark.parametrize("path", INVALID, ids=_ids)
def test_schema_refuses(path: Path) -> None:
    assert _fits_schema(path) == (path.name in STRICTER_IN_PYTHON)


@pytest.mark.parametrize(
    "path",
    INVALID,
    ids=_ids,
)
def test_parser_refuses_and_says_where(path: Path) -> None:
    with pytest.raises(ActstoreError) as caught:
        _parse(path)
    assert isinstance(caught.value, JobError if _kind(path) in JOBS else StorageError)
    assert MESSAGES[path.name] in str(caught.value)
    assert path.name in str(caught.value)


def test_every_list_here_is_about_examples_that_exist() -> None:
    names = {path.name for path in INVALID}
    assert MESSAGES.keys() == names
    assert STRICTER_IN_PYTHON.keys() <= names
    assert {_kind(path) for path in VALID} == {_kind(path) for path in INVALID} == {*JOBS, *DOCUMENTS}


@pytest.mark.parametrize("path", [path for path in VALID if _kind(path) not in JOBS], ids=_ids)
def test_store_documents_have_one_spelling(path: Path) -> None:
    assert _parse(path).to_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("kind", "parse"),
    [
        ("job", parse_job),
        ("patchjob", patching_job.parse_job),
    ],
    ids=["job", "patchjob"],
)
def test_the_schema_knows_every_field_of_a_job(kind: str, parse: Callable[[Any], Any]) -> None:
    schema = json.loads((FOLDER / f"{kind}.schema.json").read_text(encoding="utf-8"))
    full = yaml.safe_load((FOLDER / "examples" / "valid" / f"{kind}-full.yaml").read_text(encoding="utf-8"))
    assert full.keys() == schema["properties"].keys()
    assert parse(full).model_dump(mode="json") == full
