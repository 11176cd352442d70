"""Refusing direct calls of a Hugging Face model while functions are on its hooks, which these calls would skip."""

import weakref
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.exclusive import check_not_in_function

if TYPE_CHECKING:
    from torch import nn


class RawCalls:
    """A watch over calls of a Hugging Face model and of its base model."""

    def __init__(self, model: "nn.Module", base: "nn.Module") -> None:
        """Prepare the watch; nothing is put on the model before `refuse`.

        Args:
            model: the model with its head, if it has one.
            base: the model without its head.
        """
        self._modules = (base,) if model is base else (model, base)
        self._handles: list[Any] = []
        # A model outlives the wrapper whose functions are gone with it.
        weakref.finalize(self, _remove, self._handles).atexit = False

    def refuse(self) -> None:
        """Make every direct call of the model raise HookError from now on, in any thread."""
        if not self._handles:
            base = self._modules[-1]
            self._handles += [
                # Before all other hooks: nothing is computed.
                module.register_forward_pre_hook(_Refusal(id(module), base), prepend=True)
                for module in self._modules
            ]

    def admit(self) -> None:
        """Take the watch off."""
        _remove(self._handles)


class _Refusal:
    """The PyTorch hook that refuses calls. A copy of the model shares it, and it does nothing there."""

    def __init__(self, module_id: int, base: "nn.Module") -> None:
        self._module_id = module_id
        self._base = weakref.ref(base)

    def __call__(self, module: "nn.Module", _args: Any) -> None:
        base = self._base()
        if id(module) != self._module_id or base is None or check_not_in_function(base):
            return
        raise HookError(
            "there are functions on hooks of this model, and a direct call of the Hugging Face model, such as "
            "generate, would skip them; call the HookedModel (it has a method generate), or leave its context `hooks`, "
            "or call reset_hooks() first"
        )

    def __deepcopy__(self, _memo: Any) -> "_Refusal":
        return self

    def __reduce__(self) -> Any:
        return _Admission, ()


class _Admission:
    """The PyTorch hook of a model that was pickled: it does nothing."""

    def __call__(self, _module: "nn.Module", _args: Any) -> None:
        return


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
