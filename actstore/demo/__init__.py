"""A tiny trained GPT-2 and the text that it reads, bundled so that the demo needs no download."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).parent / "model"
"""Folder with the model and its tokenizer, for `from_pretrained`."""

TEXT_PATH: Path = Path(__file__).parent / "text" / "shakespeare.txt"
"""UTF-8 text of whole works of Shakespeare, in the public domain."""

__all__ = ["MODEL_PATH", "TEXT_PATH"]
