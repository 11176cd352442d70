"""Hundreds of hooks in a message are a few words."""

import pytest

from actstore.hooks.naming.listing import listing


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["hook_embed"], "hook_embed"),
        (
            [
                "hook_embed",
                *(
                    f"blocks.{layer}.{leaf}"
                    for layer in range(30)
                    for leaf in ("attn.hook_z", "hook_mlp_out")
                ),
            ],
            "hook_embed, blocks.*.attn.hook_z and blocks.*.hook_mlp_out",
        ),
        (
            [f"blocks.{layer}.hook_mlp_out" for layer in range(3, 20)],
            "blocks.3.hook_mlp_out ... blocks.19.hook_mlp_out (17 layers)",
        ),
        (
            ["blocks.3.hook_mlp_out", "blocks.7.hook_mlp_out"],
            "blocks.3.hook_mlp_out and blocks.7.hook_mlp_out",
        ),
    ],
    ids=["one", "all layers", "many layers", "few layers"],
)
def test_names_are_put_together_by_leaf(names: list[str], expected: str) -> None:
    assert listing(names, lambda _: 30) == expected
