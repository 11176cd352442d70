"""The ``cfg`` of a model that is loaded, some of whose fields may be set."""

from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError, ModelError
from actstore.hooks.families.config import HookedConfig
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.naming.hook_points import BY_LEAF, UNSUPPORTED

if TYPE_CHECKING:
    import torch

_FLAGS: Final = {
    "use_attn_result": "attn.hook_result",
    "use_hook_mlp_in": "hook_mlp_in",
    "use_split_qkv_input": "hook_q_input",
    "use_attn_in": "hook_attn_in",
}
"""Fields by which TransformerLens turns hooks on, and such a hook."""


class LiveConfig(HookedConfig):
    """Sizes, and what notebooks set: ``default_prepend_bos``, and the fields by which TransformerLens turns hooks on.

    Hooks are always there and cost nothing until they are named, so those fields change nothing.
    """

    default_prepend_bos: bool | None
    use_attn_result: bool = False
    use_hook_mlp_in: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False
    ungroup_grouped_query_attention: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field that may be set.

        Raises:
            HookError: the field turns on hooks that are not offered.
            ModelError: the field says what the model is.
        """
        if name == "default_prepend_bos":
            if value not in (True, False):
                raise ModelError(f"default_prepend_bos is {quoted(value)}; choose True or False")
        elif name in _FLAGS:
            leaf = _FLAGS[name]
            if value and leaf not in BY_LEAF:
                raise HookError(f"{name} turns on {leaf}, which is not offered: {UNSUPPORTED[leaf]}")
        elif name == "ungroup_grouped_query_attention":
            if value:
                raise ModelError(
                    "attn.hook_k and attn.hook_v have one value for each head of keys, as the model computes them; "
                    "query head h reads key head h // (n_heads // n_key_value_heads)"
                )
        elif not (hasattr(self, name) and getattr(self, name) == value):
            raise ModelError(
                f"cfg.{name} cannot be set, since cfg says what the model is; change the model, or load another"
            )
        object.__setattr__(self, name, value)

    def follow(self, device: "torch.device", dtype: "torch.dtype") -> None:
        """Take down where the model is now, and in which dtype."""
        vars(self).update(device=str(device), dtype=dtype)
