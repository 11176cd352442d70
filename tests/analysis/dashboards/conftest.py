"""A store whose tokens look like HTML, its values in memory, and a dashboard of it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore import analysis
from actstore.facade import Store

HOOK = "blocks.1.hook_resid_post"
EVIL = (
    "</script><script>document.title='hacked'</script>",
    "<img src=x onerror=alert(1)>",
    '"><b>',
    "\u202e",
)
"""Tokens that a page must show, and not obey."""


@dataclass(frozen=True)
class Small:
    """A small store and what is in it."""

    store: Store
    model: Path
    tokens: list[list[str]]
    """Text of the tokens of each sequence."""
    values: NDArray[np.float32]
    """[n_sequences, n_positions, d]."""
    directions: NDArray[np.float32]
    """[12, d]."""

    @property
    def features(self) -> NDArray[np.float32]:
        """Products of all rows with the directions, [n_sequences, n_positions, 12]."""
        return self.values @ self.directions.T


@pytest.fixture(scope="session")
def small(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Small:
    """12 sequences of 32 tokens of a random model."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("dashboards")
    model = folder / "model"
    shutil.copytree(tiny_model("gpt2", vocab_size=320), model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(list(EVIL))
    tokenizer.save_pretrained(model)
    words = ["to be, or <b>not</b> to be\n", "that & this ", *EVIL]
    random = np.random.default_rng(0)
    text = folder / "text.txt"
    text.write_text("".join(words[i] for i in random.integers(0, len(words), 150)), encoding="utf-8")
    actstore.extract(
        model=str(model),
        tokens=str(text),
        hooks=[HOOK],
        context_length=32,
        max_tokens=12 * 32,
        dtype="float32",
        out=str(folder / "store"),
    )
    store = actstore.open(str(folder / "store"))
    assert store.shape == (12, 32)
    tokens = [[tokenizer.decode([token]) for token in row] for row in store.tokens[:].tolist()]
    assert set(EVIL) <= {token for row in tokens for token in row}
    values = store[HOOK][:].numpy()
    directions = random.standard_normal((12, values.shape[-1])).astype(np.float32)
    return Small(store, model, tokens, values, directions)


@pytest.fixture(scope="session")
def made(small: Small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dashboard of features 1, 3, 4, 5 and 11 of the small store, with the logits of its model."""
    out = tmp_path_factory.mktemp("made") / "dashboard"
    model = actstore.HookedModel.from_pretrained(str(small.model))
    analysis.dashboard(
        small.store,
        HOOK,
        small.directions,
        [11, 1, 3, 4, 5],
        out=str(out),
        model=model,
        k=4,
        before=6,
        after=3,
    )
    return out
