"""What a call in Python can be given that a job file cannot hold: a model, a tokenizer, and tokens in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actstore.errors import JobError, ModelError
from actstore.extraction.live_model import LiveModel
from actstore.hooks.naming.names import each_name, long_name
from actstore.tokens import MemorySource, open_memory


@dataclass(frozen=True, eq=False)
class Given:
    """Objects in memory, in place of what the fields of a job name."""

    tokens: MemorySource | None = None
    model: LiveModel | None = None
    tokenizer: Any = None
    """A tokenizer of transformers: the one that was given, else that of the model in memory, or None."""
    is_model_checked: bool = False
    """Whether the fingerprint of the model was taken in the very call that computes, so that it is not taken again."""

    @property
    def prepends_bos(self) -> bool:
        """Whether text in memory begins with the BOS token: as with `HookedModel.to_tokens`."""
        if self.tokenizer is not None and self.model is not None and self.model.tokenizer is self.tokenizer:
            return self.model.prepends_bos
        return True

    def check_executor(self, executor: str) -> None:
        """Refuse a model in memory for workers in other processes.

        Raises:
            JobError: there is one, and the executor is not inline.
        """
        if self.model is not None and executor != "inline":
            raise JobError(
                f"executor {executor} has workers in other processes, and the model is in the memory of this one; save "
                "it with model.hf.save_pretrained(folder), with its tokenizer, and give model=folder"
            )


def taken(fields: Mapping[str, Any]) -> tuple[dict[str, Any], Given]:
    """(the fields as a job file would have them, the objects in memory that some of them stand for).

    Raises:
        ModelError, TokensError: an object is no model, or no tokens; the message says what is expected.
    """
    plain = {name: _plain(value) for name, value in fields.items()}
    tokens, model, tokenizer = plain.get("tokens"), plain.get("model"), plain.get("tokenizer")
    live = source = None
    if not isinstance(model, str | None):
        live = _live(model)
        plain["model"] = live.name
    if not isinstance(tokenizer, str | None):
        if not hasattr(tokenizer, "encode") or not hasattr(tokenizer, "name_or_path"):
            raise JobError(
                f"tokenizer is a {type(tokenizer).__name__}; give a tokenizer of transformers, or its name or folder"
            )
        plain["tokenizer"] = tokenizer.name_or_path or type(tokenizer).__name__
    elif tokenizer is None and live is not None:
        tokenizer = live.tokenizer
    if not isinstance(tokens, str | None):
        # Lists of chats begin here, too: what the source does with them is told by its documents.
        source = open_memory(tokens, column=plain.pop("column", None), max_documents=_max_documents(plain))
        plain["tokens"] = source.url
    if "hooks" in plain and not isinstance(plain["hooks"], str):
        plain["hooks"] = _names(plain["hooks"])
    return plain, Given(source, live, None if isinstance(tokenizer, str) else tokenizer)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    # A dtype of torch, whose text is torch.bfloat16.
    return str(value).removeprefix("torch.") if _is_torch(value, "dtype") else value


def _is_torch(value: Any, name: str) -> bool:
    return type(value).__module__ == "torch" and type(value).__name__ == name


def _live(model: Any) -> LiveModel:
    is_module = any(kind.__module__.startswith("torch.nn.") for kind in type(model).__mro__)
    if not is_module and not hasattr(model, "run_with_cache"):
        raise ModelError(
            f"model is a {type(model).__name__}; give a name on the Hub, a folder, a HookedModel or a model of "
            "transformers"
        )
    return LiveModel(model)


def _names(hooks: Any) -> Any:
    """Hooks with each pair such as ("resid_post", 5) written out; what is no hook is left to the check of the job."""
    try:
        return [long_name(name) if isinstance(name, tuple) else name for name in each_name(hooks)]
    except TypeError:
        return hooks


def _max_documents(fields: Mapping[str, Any]) -> int | None:
    """The most prompts that a job needs, of those that have a row each."""
    most, length = fields.get("max_tokens"), fields.get("context_length")
    if fields.get("packing", "document") != "document" or not isinstance(most, int):
        return None
    return max(1, most // length) if isinstance(length, int) and length > 0 else None
