"""A model in memory computes a store with the weights that it has now."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import actstore
from actstore.errors import JobError, ModelError, PlanMismatchError, TokensError
from actstore.extraction.live_model import memory_fingerprint
from actstore.store.format.shard import crc32c
from tests.conftest import TinyModel

PROMPTS = ["My lord!", "Who's there, my lord?"]
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def folder(tiny_model: TinyModel) -> str:
    return str(tiny_model("llama"))


@pytest.fixture
def edited(folder: str) -> Any:
    """A model of transformers whose weights are in no file."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3.0)
    return model


def states(model: Any, ids: list[int]) -> torch.Tensor:
    """[position, d], the stream out of layer 1 by transformers alone."""
    with torch.no_grad():
        hidden: torch.Tensor = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0]
    return hidden


def test_an_edited_model_stores_what_it_computes(folder: str, edited: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = {name: weight.clone() for name, weight in edited.state_dict().items()}
    report = actstore.extract(
        model=edited, tokenizer=tokenizer, tokens=PROMPTS, hooks=[("resid_post", 1)], out=tmp_path / "s"
    )
    store = actstore.open(report.url)
    for number, prompt in enumerate(PROMPTS):
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        stored = store[HOOK][number][: len(ids)]
        torch.testing.assert_close(stored, states(edited, ids), atol=1e-4, rtol=1e-4)
        original = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert (stored - states(original, ids)).abs().max() > 0.1
    assert all(torch.equal(weight, before[name]) for name, weight in edited.state_dict().items())
    assert store.plan.request.model.fingerprint.startswith("memory:")


def test_the_same_weights_go_on_and_others_are_refused(folder: str, edited: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    job: dict[str, Any] = {"tokens": PROMPTS, "hooks": HOOK, "out": tmp_path / "s", "tokenizer": tokenizer}
    actstore.extract(model=edited, **job)
    edited.save_pretrained(tmp_path / "saved")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert "nothing to do" in str(actstore.extract(model=same, **job))
    with torch.no_grad():
        same.lm_head.weight[0, 0] += 1e-3
    with pytest.raises(PlanMismatchError, match="model.fingerprint is memory:.* in the store, memory:"):
        actstore.extract(model=same, **job)
    with pytest.raises(PlanMismatchError, match="model.fingerprint is memory:.* in the store, crc32c:"):
        actstore.extract(model=folder, **job)


def test_weights_that_change_between_plan_and_run_are_refused(folder: str, tmp_path: Path) -> None:
    model = actstore.HookedModel.from_pretrained(folder)
    run = actstore.plan(model=model, tokens=PROMPTS, hooks=HOOK, out=tmp_path / "s")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    with pytest.raises(ModelError, match="made with a model in memory whose weights are memory:"):
        actstore.extract(run)


def test_a_store_is_verified_with_the_model_or_the_folder_it_was_saved_to(
    folder: str, edited: Any, tmp_path: Path
) -> None:
    model = actstore.HookedModel(edited, AutoTokenizer.from_pretrained(folder))
    url = actstore.extract(model=model, tokens=PROMPTS, hooks=HOOK, out=tmp_path / "s").url
    assert actstore.verify(url, deep=True, model=model).findings == ()
    edited.save_pretrained(tmp_path / "saved")
    checked = actstore.verify(url, deep=True, model=str(tmp_path / "saved"))
    assert (checked.findings, checked.n_rows_recomputed) == ((), 2)
    with pytest.raises(ModelError, match="made with a model in memory .*; give that model, or the folder"):
        actstore.verify(url, deep=True)


def test_the_fingerprint_is_of_names_shapes_and_bytes(folder: str) -> None:
    model = actstore.HookedModel.from_pretrained(folder, dtype="bfloat16")
    data = b""
    for name, weight in sorted(model.hf.state_dict().items()):
        data += f"{name} torch.bfloat16 {tuple(weight.shape)}\n".encode()
        data += weight.view(torch.int16).numpy().tobytes()
    assert memory_fingerprint(model) == f"memory:{crc32c(np.frombuffer(data, np.uint8)):08x}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"executor": "ray"},
            r"executor ray has workers in other processes, .*save it with model.hf.save_pretrained\(folder\)",
            id="ray",
        ),
        pytest.param(
            {"dtype": torch.bfloat16}, "the model in memory is in float32; leave dtype out", id="dtype"
        ),
        pytest.param({"device": "cuda"}, "the model in memory is on cpu; leave device out", id="device"),
        pytest.param({"revision": "main"}, "revision is for models on the Hub", id="revision"),
    ],
)
def test_what_a_model_in_memory_cannot_follow(
    folder: str, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    model = actstore.HookedModel.from_pretrained(folder)
    job: dict[str, Any] = {"model": model, "tokens": PROMPTS, "hooks": HOOK, "out": tmp_path / "s"}
    with pytest.raises(JobError, match=message):
        actstore.extract(**job | change)
    assert not (tmp_path / "s").exists()


def test_a_model_that_computes_with_more_than_its_weights_is_refused(folder: str, tmp_path: Path) -> None:
    model = actstore.HookedModel.from_pretrained(folder)
    model.add_hook(HOOK, lambda value, hook: value * 2)
    with pytest.raises(ModelError, match="has functions or SAEs on its hooks, .* call reset_hooks"):
        actstore.plan(model=model, tokens=PROMPTS, hooks=HOOK, out=tmp_path / "s")


def test_a_model_without_a_tokenizer(edited: Any, tmp_path: Path) -> None:
    job: dict[str, Any] = {"model": edited, "hooks": HOOK, "out": tmp_path / "s"}
    with pytest.raises(TokensError, match="the model in memory has no tokenizer, .* give tokenizer="):
        actstore.plan(tokens=PROMPTS, **job)
    report = actstore.extract(tokens=[[5, 6, 7], [8]], **job)
    store = actstore.open(report.url)
    torch.testing.assert_close(store[HOOK][0], states(edited, [5, 6, 7]), atol=1e-4, rtol=1e-4)


def test_only_the_layers_that_were_loaded(folder: str, tmp_path: Path) -> None:
    model = actstore.HookedModel.from_pretrained(folder, n_layers=2)
    url = actstore.extract(model=model, tokens=PROMPTS, hooks=HOOK, out=tmp_path / "s").url
    _, cache = actstore.HookedModel.from_pretrained(folder).run_with_cache(PROMPTS[0])
    length = cache[HOOK].shape[1]
    torch.testing.assert_close(actstore.open(url)[HOOK][0][:length], cache[HOOK][0])


def test_something_else_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="model is a int; give a name on the Hub, a folder, a HookedModel"):
        actstore.plan(model=5, tokens=PROMPTS, hooks=HOOK, out=tmp_path / "s")
