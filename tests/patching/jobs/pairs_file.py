"""Pairs of prompts for tests: random ids, of several lengths, that differ in a few positions."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def random_pairs(lengths: Sequence[int], *, seed: int = 0) -> list[dict[str, Any]]:
    """A pair for each length; positions 0 are equal."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for length in lengths:
        clean = torch.randint(2, 300, (length,), generator=generator)
        corrupted = clean.clone()
        changed = torch.randint(1, length, (2,), generator=generator)
        corrupted[changed] = (clean[changed] + 1) % 300
        answer, wrong = torch.randperm(300, generator=generator)[:2].tolist()
        pairs.append(
            {"clean": clean.tolist(), "corrupted": corrupted.tolist(), "answer": answer, "wrong": wrong}
        )
    return pairs


def write_jsonl(path: Path, pairs: Sequence[dict[str, Any]]) -> str:
    """Write one pair a line; returns the path as text."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)
