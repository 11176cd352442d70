"""Hook names: patterns to canonical names, and what is said when nothing matches."""

import pytest

from actstore.errors import HookError
from actstore.hooks.names import canonical, layer_of, resolve, split

LEAVES = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")


def _resolve(*patterns: str, undefined: dict[str, str] | None = None) -> tuple[str, ...]:
    undefined = undefined or {}
    leaves = [leaf for leaf in LEAVES if leaf not in undefined]
    return resolve(patterns, n_layers=3, leaves=leaves, undefined=undefined)


def test_a_glob_selects_every_layer_in_forward_order() -> None:
    assert _resolve("blocks.*.hook_mlp_out") == tuple(f"blocks.{i}.hook_mlp_out" for i in range(3))


def test_order_is_that_of_the_forward_not_of_the_patterns() -> None:
    assert _resolve("blocks.2.hook_attn_out", "blocks.0.hook_mlp_out", "blocks.0.hook_attn_out") == (
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_out",
        "blocks.2.hook_attn_out",
    )


def test_the_same_tensor_is_stored_once() -> None:
    assert _resolve("blocks.*.hook_resid_p*") == (
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_resid_post",
        "blocks.1.hook_resid_post",
        "blocks.2.hook_resid_post",
    )
    assert canonical("blocks.2.hook_resid_pre") == "blocks.1.hook_resid_post"
    assert canonical("blocks.0.hook_resid_pre") == "blocks.0.hook_resid_pre"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        pytest.param("blocks.1.hook_resid_pots", "nearest names are blocks.1.hook_resid_post", id="misspelt"),
        pytest.param("blocks.7.hook_resid_post", "layers 0 to 2", id="layer too high"),
        pytest.param("blocks.*.hook_nothing", "matches nothing", id="unknown leaf"),
        pytest.param("", "matches nothing", id="empty"),
    ],
)
def test_a_pattern_without_a_match_says_what_comes_nearest(pattern: str, message: str) -> None:
    with pytest.raises(HookError, match=message):
        _resolve("blocks.0.hook_resid_post", pattern)


def test_a_hook_that_the_architecture_lacks_is_refused_with_the_reason() -> None:
    with pytest.raises(HookError, match="does not exist in this model: they run in parallel"):
        _resolve("blocks.1.hook_resid_mid", undefined={"hook_resid_mid": "they run in parallel"})


def test_split() -> None:
    assert split("blocks.11.attn.hook_z") == (11, "attn.hook_z")
    assert layer_of("blocks.11.hook_resid_post") == 11
    with pytest.raises(HookError, match="not a hook name"):
        split("model.layers.5")
