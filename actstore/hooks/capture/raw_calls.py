"""Calls of a model that go past its hooks are errors while functions hang there, or they would be skipped unseen."""

import weakref
from typing import TYPE_CHECKING, Any

from actstore.errors import HookError
from actstore.hooks.capture.exclusive import check_not_in_function

if TYPE_CHECKING:
    from torch import nn


class RawCalls:
    """A watch over the Hugging Face model and the part of it below the head."""

    def __init__(self, model: "nn.Module", base: "nn.Module") -> None:
        """Nothing is put on the model before `refuse`.

        Args:
            model: with its head, if it has one.
            base: the same without head.
        """
        self._modules = (base,) if model is base else (model, base)
        self._handles: list[Any] = []
        # A model outlives the wrapper whose functions are gone with it.
        weakref.finalize(self, _remove, self._handles).atexit = False

    def refuse(self) -> None:
        """From now on, a call of the model that is no forward of ours raises HookError, in any thread."""
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
    """The hook of PyTorch. A copy of the model has a copy of it, which does nothing."""

    def __init__(self, module_id: int, base: "nn.Module") -> None:
        self._module_id = module_id
        self._base = weakref.ref(base)

    def __call__(self, module: "nn.Module", _args: Any) -> None:
        base = self._base()
        if id(module) != self._module_id or base is None or check_not_in_function(base):
            return
        raise HookError(
            "functions hang on hooks of this model, and a call of the model of transformers itself, such as generate, "
            "would skip them; call the HookedModel, or leave its context `hooks`, or call reset_hooks() first"
        )

    def __deepcopy__(self, _memo: Any) -> "_Refusal":
        return self

    def __reduce__(self) -> Any:
        return _Admission, ()


class _Admission:
    """What a model that was pickled has in its place."""

    def __call__(self, _module: "nn.Module", _args: Any) -> None:
        return


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
