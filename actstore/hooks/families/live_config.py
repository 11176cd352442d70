"""The ``cfg`` of a model that is loaded, some of whose fields may be set."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import HookError, ModelError
from actstore.hooks.families.config import SHARED_KEYS, HookedConfig
from actstore.hooks.messages.quoted import quoted

if TYPE_CHECKING:
    import torch

_FLAGS: Final[Mapping[str, frozenset[str]]] = {
    "use_attn_result": frozenset(),
    "use_hook_mlp_in": frozenset(),
    "use_split_qkv_input": frozenset({"hook_q_input", "hook_k_input", "hook_v_input"}),
    "use_attn_in": frozenset({"hook_attn_in"}),
}
"""Fields by which TransformerLens turns hooks on, with the hooks that functions of names select after that."""


class LiveConfig(HookedConfig):
    """Sizes, and what notebooks set: ``default_prepend_bos``, and the fields by which TransformerLens turns hooks on.

    Hooks are always there and cost nothing until they are named. So those fields change only what functions of names
    select: copies of the stream for each head (``hook_q_input``) are left out until they are turned on.
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
            HookError: the field turns on a hook that the model cannot have.
            ModelError: the field says what the model is.
        """
        if name == "default_prepend_bos":
            if value not in (True, False):
                raise ModelError(f"default_prepend_bos is {quoted(value)}; choose True or False")
        elif name in _FLAGS:
            if value and name == "use_attn_in" and self.n_heads != self.n_key_value_heads:
                raise HookError(f"{name} turns on hook_attn_in, which does not exist here: {SHARED_KEYS}")
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

    def switched_on(self) -> frozenset[str]:
        """Leaves of hooks for each head that functions of names select."""
        return frozenset(leaf for flag, leaves in _FLAGS.items() if getattr(self, flag) for leaf in leaves)

    def follow(self, device: "torch.device", dtype: "torch.dtype") -> None:
        """Take down where the model is now, and in which dtype."""
        vars(self).update(device=str(device), dtype=dtype)
