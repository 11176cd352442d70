"""The embedded default: a tiny trained GPT-2 and the text it reads, so that nothing needs downloading."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).parent / "model"
"""Folder with the model and its tokenizer, as `from_pretrained` takes it."""

TEXT_PATH: Path = Path(__file__).parent / "text" / "shakespeare.txt"
"""UTF-8 text: whole works of Shakespeare, public domain."""

__all__ = ["MODEL_PATH", "TEXT_PATH"]
