"""The edges of a model: what each part writes into the residual stream, and which later parts read it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from actstore.hooks.model import HookedModel

Kind = Literal["input", "head", "mlp", "logits"]


@dataclass(frozen=True)
class Node:
    """One end of edges."""

    name: str
    """``input``, ``a3.h0`` (a head), ``m3`` (an MLP); of readers ``a3.h0<q>``, ``a3.kv0<k>``, ``m3``, ``logits``."""
    layer: int
    kind: Kind


def writers(model: HookedModel) -> list[Node]:
    """The embedding (``input``), and in each layer all heads and the MLP."""
    nodes = [Node("input", -1, "input")]
    for layer in range(model.cfg.n_layers):
        nodes += [Node(f"a{layer}.h{head}", layer, "head") for head in range(model.cfg.n_heads)]
        nodes.append(Node(f"m{layer}", layer, "mlp"))
    return nodes


def readers(model: HookedModel) -> list[Node]:
    """In each layer queries of all heads, keys and values of all heads of these, and the MLP; then the logits."""
    cfg = model.cfg
    nodes = []
    for layer in range(cfg.n_layers):
        head = "h" if cfg.n_key_value_heads == cfg.n_heads else "kv"
        nodes += [Node(f"a{layer}.h{index}<q>", layer, "head") for index in range(cfg.n_heads)]
        for which in "kv":
            nodes += [
                Node(f"a{layer}.{head}{index}<{which}>", layer, "head")
                for index in range(cfg.n_key_value_heads)
            ]
        nodes.append(Node(f"m{layer}", layer, "mlp"))
    return [*nodes, Node("logits", cfg.n_layers, "logits")]


def has_edge(writer: Node, reader: Node, *, is_parallel: bool) -> bool:
    """Whether a part reads what another one writes.

    Args:
        writer: a node of `writers`.
        reader: a node of `readers`.
        is_parallel: whether attention and MLP of a layer read the same stream.
    """
    if writer.layer == reader.layer:
        return writer.kind == "head" and reader.kind == "mlp" and not is_parallel
    return writer.layer < reader.layer


def mask(model: HookedModel) -> Iterator[list[bool]]:
    """Whether there is an edge from each writer (rows) to each reader (columns)."""
    for writer in writers(model):
        yield [has_edge(writer, reader, is_parallel=model.cfg.parallel_attn_mlp) for reader in readers(model)]
