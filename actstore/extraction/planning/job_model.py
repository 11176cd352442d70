"""The model of a job, by its name or in memory: what planning needs to know of it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from actstore.errors import JobError
from actstore.extraction.fingerprint import fingerprint
from actstore.extraction.live_model import LiveModel
from actstore.extraction.planning.job import Job
from actstore.extraction.planning.stored_hooks import selected_hooks, stored_hooks
from actstore.hooks.loading.embedding_rows import embedding_rows
from actstore.hooks.loading.pretrained import load_config
from actstore.store.format.plan import HookArray, ModelIdentity

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Dtype = Literal["bfloat16", "float16", "float32"]


class JobModel:
    """The model of a job. Its weights are not loaded."""

    def __init__(self, job: Job, live: LiveModel | None) -> None:
        """
        Args:
            job: the job.
            live: the model, if it is in memory.

        Raises:
            ModelError: there is no such model.
            JobError: the job asks for something that a model in memory cannot follow.
        """
        self._job = job
        self._live = live
        if live is not None:
            _check(job, live)
        self.config: PretrainedConfig = (
            load_config(job.model, revision=job.revision) if live is None else live.config
        )

    @property
    def n_positions(self) -> int | None:
        """Most tokens in a row that the model is made for; None if its configuration names no limit."""
        longest: int | None = getattr(self.config, "max_position_embeddings", None)
        return longest

    @property
    def n_embeddings(self) -> int:
        """Number of token ids that the model has embeddings for."""
        return embedding_rows(self.config, self._job.model) if self._live is None else self._live.n_embeddings

    @property
    def bos(self) -> int | None:
        """Its BOS token, if its configuration names one."""
        token = getattr(self.config, "bos_token_id", None)
        return token if isinstance(token, int) else None

    @property
    def dtype(self) -> Dtype:
        """The dtype to compute and to store in.

        Raises:
            JobError: the model is in one that cannot be stored.
        """
        if self._job.dtype is not None:
            return self._job.dtype
        saved = getattr(self.config, "dtype", None) if self._live is None else self._live.dtype
        name = str(saved or "float32").removeprefix("torch.")
        if name not in ("float32", "float16", "bfloat16"):
            raise JobError(f"the model was saved in {name}, which cannot be stored; choose a dtype")
        return cast(Dtype, name)

    def hooks(self, context_length: int) -> tuple[HookArray, ...]:
        """The arrays of the job's hooks.

        Raises:
            ModelError: the family of the model is not known.
            HookError: a pattern selects nothing, or only what a store cannot hold.
        """
        if self._live is None:
            return stored_hooks(self.config, self._job.hook_patterns, context_length)
        hooked = self._live.hooked
        return selected_hooks(hooked.names, hooked.cfg, self._job.hook_patterns, context_length)

    def identity(self) -> ModelIdentity:
        """The identity of the model in a plan."""
        job, live = self._job, self._live
        return ModelIdentity(
            name=absolute_model(job.model),
            revision=job.revision,
            fingerprint=fingerprint(job.model, job.revision) if live is None else live.fingerprint,
            model_type=self.config.model_type,
            n_layers=self.config.num_hidden_layers if live is None else live.hooked.cfg.n_layers,
            config=json.loads(self.config.to_json_string()),
        )

    def check_context(self, context_length: int) -> None:
        """Check that the model has so many positions.

        Raises:
            JobError: it has fewer.
        """
        longest = self.n_positions
        if longest is not None and context_length > longest:
            raise JobError(
                f"context_length {context_length} is longer than the {longest} positions of {self._job.model}; "
                f"choose {longest} or less"
            )


def _check(job: Job, live: LiveModel) -> None:
    """Refuse what a model in memory cannot follow: it is used as it is."""
    if job.revision is not None:
        raise JobError("revision is for models on the Hub, and the model is in memory; leave revision out")
    if job.dtype not in (None, live.dtype):
        raise JobError(
            f"dtype {job.dtype} was asked for, and the model in memory is in {live.dtype}; leave dtype out, or convert "
            f"the model: model.to(torch.{job.dtype})"
        )


def absolute_model(model: str) -> str:
    """The absolute path of a model in a folder, for processes in other working directories; a Hub name unchanged."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model
