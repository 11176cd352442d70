"""Configurations with sizes that no model has: refused in seconds, when planned and when loaded, in one sentence."""

import json
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import actstore
from actstore.errors import ModelError
from actstore.hooks.families.config_sizes import check_sizes
from actstore.hooks.families.stored_config import hooks_of_stored
from tests.conftest import TinyModel

ABSURD: dict[str, tuple[str, str, Any, str]] = {
    "layers": ("gpt2", "n_layer", 10**7, "'n_layer' larger than 1,000"),
    "layers of llama": ("llama", "num_hidden_layers", 10**9, "'num_hidden_layers' larger than 1,000"),
    "layers of gpt_neo": (
        "gpt_neo",
        "attention_types",
        [[["global"], 10**7]],
        "'attention_types' larger than",
    ),
    "no layers": ("gpt2", "n_layer", 0, "n_layer '0' where a whole number"),
    "no heads": ("gpt2", "n_head", 0, "n_head '0' where a whole number of 1 or more is expected"),
    "no heads of llama": ("llama", "num_attention_heads", 0, "num_attention_heads '0'"),
    "no keys": ("llama", "num_key_value_heads", 0, "num_key_value_heads '0'"),
    "many heads": ("gpt2", "n_head", 100, "100 heads in a width of 64"),
    "heads beyond all": ("llama", "num_attention_heads", 10**8, "'num_attention_heads' larger than 100,000"),
    "negative": ("gpt2", "n_embd", -64, "n_embd '-64'"),
    "negative layers": ("llama", "num_hidden_layers", -3, "num_hidden_layers '-3'"),
    "text": ("gpt2", "n_layer", "3", "n_layer '3' where a whole number"),
    "fraction": ("llama", "hidden_size", 64.5, "hidden_size '64.5'"),
    "no number": ("llama", "hidden_size", float("nan"), "hidden_size 'nan'"),
    "infinite": ("llama", "vocab_size", float("inf"), "vocab_size 'inf'"),
    "true": ("llama", "vocab_size", True, "vocab_size 'True'"),
    "mapping": ("llama", "vocab_size", {"a": 1}, "vocab_size"),
    "vocabulary": ("llama", "vocab_size", 10**10, "'vocab_size' larger than 1,000,000,000"),
    "width": ("llama", "hidden_size", 1 << 60, "'hidden_size' larger than 10,000,000"),
    "context": ("llama", "max_position_embeddings", 0, "max_position_embeddings '0'"),
}
Use = Callable[[Path, Path], object]


def _plan(folder: Path, out: Path) -> object:
    text = folder / "text.txt"
    text.write_text("my lord\n" * 100)
    hooks = ["blocks.0.hook_resid_post"]
    return actstore.plan(model=str(folder), tokens=str(text), hooks=hooks, context_length=8, out=str(out))


USES: dict[str, Use] = {
    "plan": _plan,
    "load": lambda folder, _: actstore.HookedModel.from_pretrained(str(folder)),
    "load a part": lambda folder, _: actstore.HookedModel.from_pretrained(str(folder), n_layers=1),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_sizes_that_no_model_has(tiny_model: TinyModel, tmp_path: Path, kind: str) -> None:
    model_type, field, value, message = ABSURD[kind]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(model_type), folder)
    config = json.loads((folder / "config.json").read_text())
    assert field in config
    (folder / "config.json").write_text(json.dumps(config | {field: value}))
    for name, use in USES.items():
        started = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ModelError) as caught:
            use(folder, tmp_path / "store")
        assert time.monotonic() - started < 5, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10, name
        text = str(caught.value)
        assert message in text, name
        assert text.startswith(f"the configuration of the model {folder} has ")
        assert text.endswith("; correct its config.json")
    assert not (tmp_path / "store").exists()
    # What a store says of its model is held to the same rule.
    with pytest.raises(ModelError) as caught:
        hooks_of_stored(config | {field: value})
    assert message in str(caught.value)
    assert str(caught.value).endswith("; the store is damaged")


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": None},
        {"time_step_limit": [0.0, float("inf")]},
        {"intermediate_size": [96, 96, 96]},
        {"seq_length": 1 << 30},
        {"vocab_size_per_layer_input": 262_144},
        {"per_layer_config": {"15": {"sliding_window": 4096}}},
        {"max_position_embeddings": 1200.0},
    ],
)
def test_sizes_that_families_do_have(fields: dict[str, Any]) -> None:
    check_sizes({"hidden_size": 64, "num_attention_heads": 4} | fields, "it", "mend it")


def test_no_causal_model_of_transformers_is_refused_by_its_defaults() -> None:
    n_types = 0
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            fields = CONFIG_MAPPING[model_type]().to_dict()
        except Exception:  # noqa: BLE001 - some have no defaults
            continue
        check_sizes(fields, model_type, "")
        n_types += 1
    assert n_types > 100
