"""Turning errors of libraries that load a model into one sentence that says where to look."""

import contextlib
import os
import re
from collections.abc import Iterator
from typing import Final

from actstore.errors import ActstoreError, ModelError
from actstore.reason import reason

_FOREIGN_ADVICE: Final = re.compile(
    r"trust_remote_code|ignore_mismatched_sizes|weights.only|use_safetensors|repo_type|force_download|[Cc]heckout 'http"
    r"|You can inspect|look at the above|file an issue|token=|above traceback"
)
"""Advice in errors of libraries about arguments that our functions do not have, or reports that were not printed."""


@contextlib.contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turn any error of a library in this context into one sentence about a model.

    Raises:
        ModelError: an error was raised that is not one of actstore's.
    """
    try:
        yield
    except ActstoreError:
        raise
    except Exception as error:
        raise ModelError(_sentence(name, error)) from error


def one_line(error: BaseException) -> str:
    """The text of an error on one line, without advice that makes no sense outside of its library."""
    text = reason(error)
    if isinstance(error, KeyError):
        return f"the entry {text!r} is missing"
    kept = [part for part in re.split(r"(?<=\.) +(?=[A-Z])", text) if not _FOREIGN_ADVICE.search(part)]
    text = (" ".join(kept) or text).rstrip(". ")
    return (
        text if isinstance(error, OSError | ValueError | RuntimeError | ImportError) else _typed(error, text)
    )


def _typed(error: BaseException, text: str) -> str:
    known = type(error).__module__.split(".")[0] not in ("builtins", "torch")
    return text if known else f"{type(error).__name__}: {text}"


def _sentence(name: str, error: Exception) -> str:
    cause = _root(error)
    if isinstance(error, ImportError) or isinstance(cause, ImportError):
        return (
            f"{name} cannot be loaded with the packages that are installed: {one_line(cause)}; the model may well be "
            "sound, so mend the Python environment (pip check names what does not fit)"
        )
    is_folder = os.path.isdir(name)  # noqa: PTH112 - a Hub name is no path
    where = f"the folder {name}" if is_folder else f"model {name!r}"
    if "trust_remote_code" in str(error):
        return (
            f"{where} needs Python code that comes with it, which a job never runs; "
            "HookedModel.from_pretrained does with trust_remote_code=True, if you trust it"
        )
    if "ignore_mismatched_sizes" in str(error):
        return f"the weights of {name} have other shapes than its config.json says; it is damaged, or edited by hand"
    if type(error).__name__ == "UnpicklingError":
        return f"{where} holds weights that are damaged, or no weights of PyTorch although they end in .bin"
    if is_folder:
        return f"{where} does not hold a model that transformers can load: {one_line(error)}"
    offline = " (HF_HUB_OFFLINE is set, so only folders and cached models can be used)"
    is_offline = os.environ.get("HF_HUB_OFFLINE") in ("1", "true", "True") and isinstance(cause, OSError)
    return (
        f"{where} is neither a folder nor a model on the Hugging Face Hub that can be reached: {one_line(error)}"
        + (offline if is_offline else "")
    )


def _root(error: BaseException) -> BaseException:
    """The first error in the chain of causes of an error."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return error
