"""Models whose layers depend on how many there are: stored right, and found where an older version was wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import actstore
from actstore.errors import ModelError
from actstore.extraction.computing import worker
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.value_checks import reference
from actstore.extraction.value_checks.reference import Reference
from actstore.hooks.loading.pretrained import load_config
from actstore.hooks.model import HookedModel
from actstore.storage.local import LocalBlobs
from actstore.store.records.commit import commit_key, read_commit

TinyModel = Callable[..., Path]
Fields = dict[str, Any]
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture
def job(fields: Fields, tiny_model: TinyModel) -> Fields:
    """The first of three layers of a model that scales what each adds by their number."""
    return fields | {"model": str(tiny_model("minicpm3")), "hooks": [HOOK]}


def states(job: Fields, rows: slice) -> torch.Tensor:
    """Hidden states after the first layer, from transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(job["model"]).eval()
    ids = torch.from_numpy(actstore.open(job["out"]).tokens[rows]).long()
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
    stream: torch.Tensor = output.hidden_states[1]
    return stream


def shortened(plan: Any, spec: Any) -> HookedModel:
    """The model as older versions loaded it: with a configuration of fewer layers."""
    del plan
    config = load_config(spec.model)
    config.num_hidden_layers = 1
    return HookedModel(AutoModel.from_pretrained(spec.model, config=config).eval())


def test_stored_values_are_those_of_the_whole_model(job: Fields) -> None:
    actstore.extract(actstore.plan(**job))
    rows = slice(0, 8)  # a batch of the run
    assert torch.equal(actstore.open(job["out"])[HOOK][rows], states(job, rows))
    plan = actstore.open(job["out"]).plan
    record = read_commit(LocalBlobs(job["out"]), plan, 0)
    assert record.golden is not None
    assert record.golden.reference == "whole"
    assert fingerprint(job["model"], None) == plan.request.model.fingerprint
    checked = actstore.verify(job["out"], deep=True)
    assert checked.findings == ()
    assert checked.is_complete


def test_a_model_that_was_loaded_wrong_commits_nothing(job: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "load_planned_model", shortened)
    with pytest.raises(ModelError, match=f"{HOOK} of sequence .* was captured .* away at position"):
        actstore.extract(actstore.plan(**job))
    assert not (Path(job["out"]) / commit_key("0000", 0)).exists()


def test_without_memory_for_the_whole_model_the_record_says_so(
    job: Fields, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "free_nbytes", lambda _device: 100_000)
    actstore.extract(actstore.plan(**job))
    record = read_commit(LocalBlobs(job["out"]), actstore.open(job["out"]).plan, 0)
    assert record.golden is not None
    assert record.golden.reference == "loaded"
    assert actstore.verify(job["out"], deep=True).findings == ()


def test_wrong_stores_of_older_versions_are_told(job: Fields, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as older:
        older.setattr(worker, "load_planned_model", shortened)
        older.setattr(
            worker, "reference_for", lambda _name, _revision, model, _batch: Reference(model, "loaded")
        )
        actstore.extract(actstore.plan(**job))
    difference = actstore.open(job["out"])[HOOK][0:8] - states(job, slice(0, 8))
    assert difference.abs().max() > 0.1
    deep = actstore.verify(job["out"], deep=True)
    assert deep.damage
    assert all("is not what the model computes" in finding.problem for finding in deep.damage)
    assert actstore.verify(job["out"]).findings == ()
    _forget_the_reference(job)
    (finding,) = actstore.verify(job["out"]).findings
    assert finding.severity == "warning"
    assert "ran the first 1 of 3 as if there were no more" in finding.problem


def _forget_the_reference(job: Fields) -> None:
    """Remove the reference from records and seal, as in stores of older versions."""
    blobs = LocalBlobs(job["out"])
    plan = actstore.open(job["out"]).plan
    record = read_commit(blobs, plan, 0)
    assert record.golden is not None
    golden = record.golden.model_copy(update={"reference": None})
    path = Path(job["out"]) / commit_key(plan.run, 0)
    path.write_bytes(record.model_copy(update={"golden": golden}).to_bytes())
