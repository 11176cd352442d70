"""Capturing: the activations over generated text, with the tokens, roles and columns that its file has."""

from typing import Any, Final

from actstore.extraction.events import OnEvent, ignore
from actstore.extraction.planning.planning import PlannedRun, plan
from actstore.generating.job import SAMPLING, GenerationJob
from actstore.tokens import load_tokenizer

KEPT: Final = ("prompt_number", "sample", "seed", "finish", "n_prompt_tokens", *SAMPLING)
"""Columns of the file that a store keeps, besides those of the prompts."""


def plan_capture(
    job: GenerationJob,
    *,
    longest: int,
    hooks: Any,
    out: str,
    positions: str = "all",
    on_event: OnEvent = ignore,
) -> PlannedRun:
    """Plan the extraction of activations over text that `generate` wrote; `actstore.extract` then runs it.

    Sequence i of the store is row i of the file, and the store has its roles, turns and columns. Values are computed
    anew over the whole sequence, so they are those of the generation up to rounding.

    Args:
        job: the job that wrote the file.
        longest: tokens in a sequence of the store; ``longest`` of its `GenerationReport`.
        hooks: hook names or globs, as `actstore.plan` takes them.
        out: path or URL of the store.
        positions: positions whose activations are stored, such as ``role:assistant``.
        on_event: called with each event of progress.

    Raises:
        JobError, ModelError, HookError, TokensError, StorageError: something is wrong; the message says what.
        PlanMismatchError: the store at ``out`` is of another plan; the differences are named.
    """
    tokenizer = load_tokenizer(job.model, job.revision)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return plan(
        model=job.model,
        revision=job.revision,
        dtype=job.dtype,
        device=job.device,
        tokens=job.out,
        column="input_ids",
        token_roles=True,
        keep=[*job.kept_columns, *KEPT],
        packing="document",
        pad_token=0 if pad is None else pad,
        positions=positions,
        hooks=hooks,
        context_length=longest,
        out=out,
        on_event=on_event,
    )
