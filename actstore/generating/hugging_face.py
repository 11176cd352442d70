"""Continuations by the generation of Hugging Face."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actstore.generating.engine import Continuation
from actstore.generating.job import GenerationJob
from actstore.hooks.loading.pretrained import load_config, load_model
from actstore.tokens.batch import TokenIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class HuggingFaceEngine:
    """An `Engine` that runs ``model.generate`` in batches, padded on the left."""

    def __init__(self, job: GenerationJob, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Load the model.

        Raises:
            ModelError: it cannot be loaded.
        """
        from transformers import GenerationConfig

        self._job = job
        config = load_config(job.model, revision=job.revision)
        self._model: Any = load_model(
            job.model,
            config,
            dtype=job.dtype,
            device=job.device,
            revision=job.revision,
            trust_remote_code=False,
            layers="",
            n_layers=None,
            has_head=True,
            attention=None,
        )
        own: Any = self._model.generation_config
        ends: Any = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends or ())
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else min(self._ends, default=0)
        # The model's own defaults, such as penalties, would come in where this says nothing.
        self._model.generation_config = GenerationConfig(
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=self._pad,
        )

    def __call__(self, prompts: Sequence[TokenIds], seeds: Sequence[int]) -> list[Continuation]:
        """Like `Engine`."""
        width = max(map(len, prompts))
        ids = np.full((len(prompts), width), self._pad, np.int64)
        mask = np.zeros((len(prompts), width), np.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        device = self._model.device
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                logits_processor=self._processors(seeds),
            )
        return [self._cut(row) for row in made[:, width:].cpu().numpy().astype(np.int32)]

    def _processors(self, seeds: Sequence[int]) -> Any:
        from transformers import (
            LogitsProcessorList,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        from actstore.generating.seeded import SeededSampling

        job = self._job
        if job.temperature == 0:
            return LogitsProcessorList()
        # In the order of Hugging Face's own sampling.
        return LogitsProcessorList(
            [
                TemperatureLogitsWarper(job.temperature),
                *([] if job.top_k is None else [TopKLogitsWarper(job.top_k)]),
                *([] if job.top_p == 1 else [TopPLogitsWarper(job.top_p)]),
                SeededSampling(seeds),
            ]
        )

    def _cut(self, ids: TokenIds) -> Continuation:
        """The ids up to the first that ends a text; what follows in a batch is padding."""
        ends = np.flatnonzero(np.isin(ids, list(self._ends)))
        return Continuation(ids[: ends[0] + 1], "stop") if len(ends) else Continuation(ids, "length")
