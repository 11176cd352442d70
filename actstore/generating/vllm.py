"""Continuations by vLLM, where it is installed.

The tests cannot run it, since it needs a GPU; all that is done here is to pass on ids and parameters.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actstore.errors import MissingExtraError
from actstore.generating.engine import Continuation
from actstore.generating.job import GenerationJob
from actstore.tokens.batch import TokenIds


class VllmEngine:
    """An `Engine` that runs vLLM in this process."""

    def __init__(self, job: GenerationJob) -> None:
        """Load the model.

        Raises:
            MissingExtraError: vLLM is not installed.
        """
        try:
            from vllm import LLM
        except ImportError as error:
            raise MissingExtraError(
                "engine vllm needs the package vllm, which is not installed; run pip install 'actstore[vllm]'"
            ) from error
        self._job = job
        self._model: Any = LLM(
            model=job.model,
            revision=job.revision,
            dtype=job.dtype or "auto",
            trust_remote_code=False,
            generation_config="vllm",  # not the model's own penalties
        )

    def __call__(self, prompts: Sequence[TokenIds], seeds: Sequence[int]) -> list[Continuation]:
        """Like `Engine`."""
        from vllm import SamplingParams

        job = self._job
        parameters = [
            SamplingParams(
                n=1,
                temperature=job.temperature,
                top_p=job.top_p,
                top_k=0 if job.top_k is None else job.top_k,
                max_tokens=job.max_new_tokens,
                seed=seed,
            )
            for seed in seeds
        ]
        given = [{"prompt_token_ids": prompt.tolist()} for prompt in prompts]
        made = [request.outputs[0] for request in self._model.generate(given, parameters, use_tqdm=False)]
        return [
            Continuation(
                np.array(one.token_ids, np.int32), "stop" if one.finish_reason == "stop" else "length"
            )
            for one in made
        ]
