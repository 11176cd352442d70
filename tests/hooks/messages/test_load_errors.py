"""Models that cannot be loaded: one line that says where the fault is, without advice that belongs elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.errors import ModelError
from actstore.hooks.model import HookedModel

TinyModel = Callable[..., Path]
FOREIGN = ("trust_remote_code=", "ignore_mismatched", "weights_only", "repo_type", "Checkout", "above")


def config(**fields: Any) -> Callable[[Path], None]:
    """Change fields of config.json."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def file(name: str, content: str | bytes | None) -> Callable[[Path], None]:
    """Write a file, or take it away."""

    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.gguf")


CODE = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "code of its own": (
        config(model_type="own", auto_map=CODE),
        "needs Python code that comes with it, which a job never runs",
    ),
    "unknown type": (config(model_type="own"), "model type `own` but Transformers does not recognize"),
    "other shapes": (config(intermediate_size=96), "other shapes than its config.json says"),
    "a field of another type": (
        config(num_hidden_layers="four"),
        "has num_hidden_layers 'four' where a whole",
    ),
    "an impossible number": (
        config(num_attention_heads=0),
        "has num_attention_heads '0' where a whole number",
    ),
    "unknown activation": (config(hidden_act="nope"), "the entry 'nope' is missing"),
    "no JSON": (file("config.json", "{bad"), "is not a valid JSON file"),
    "damaged weights": (file("model.safetensors", "abc"), "header too small"),
    "no weights": (file("model.safetensors", None), "no file named model.safetensors"),
    "not PyTorch": (pickled, "damaged, or no weights of PyTorch"),
    "missing package": (
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "cannot be loaded with the packages that are installed.*mend the Python environment",
    ),
    "only GGUF": (only_gguf, "all weights in the folder .* are GGUF.*as it was published for transformers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_model_that_cannot_be_loaded_is_one_line(tiny_model: TinyModel, tmp_path: Path, case: str) -> None:
    change, message = BROKEN[case]
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        HookedModel.from_pretrained(str(folder), device="cpu")
    text = str(caught.value)
    assert str(folder) in text
    assert "\n" not in text
    assert not any(
        advice in text.replace("HookedModel.from_pretrained does with trust_", "") for advice in FOREIGN
    )


@pytest.mark.parametrize(
    ("name", "has_hint"), [("gpt2", True), ("a b", False), ("a/b/c", False)], ids=["hub", "no name", "path"]
)
def test_only_what_the_network_could_mend_is_put_down_to_being_offline(name: str, has_hint: bool) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a model") as caught:
        HookedModel.from_pretrained(name)
    assert ("HF_HUB_OFFLINE is set" in str(caught.value)) is has_hint
    assert "\n" not in str(caught.value)


def test_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"model\.gguf is GGUF.*with config\.json and safetensors"):
        HookedModel.from_pretrained(tmp_path / "model.gguf")


def test_a_job_never_runs_code_of_a_model(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(fields["model"], folder)
    config(model_type="own", auto_map=CODE)(folder)
    (folder / "configuration_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="which a job never runs"):
        actstore.plan(**fields | {"model": str(folder)})
    assert not (tmp_path / "ran").exists()


def test_a_broken_installation_is_not_put_down_to_the_model(tiny_model: TinyModel, tmp_path: Path) -> None:
    """A package that transformers imports if it is there, and that cannot be imported."""
    broken = tmp_path / "accelerate"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        "raise ImportError('libcudart.so.99: cannot open shared object file')"
    )
    code = (
        "import sys; from actstore.errors import ModelError; from actstore.hooks.model import HookedModel\n"
        f"try: HookedModel.from_pretrained({str(tiny_model('llama'))!r}, device='cpu')\n"
        "except ModelError as error: print(error)"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stdout.splitlines()
    assert "cannot be loaded with the packages that are installed: libcudart.so.99" in line
    assert "does not hold a model" not in line
