"""One Ray worker against inline, start-up not counted."""

import shutil
from pathlib import Path

import actstore
from tests.benchmarks.measure import Ratio, in_turns

N_TOKENS = 2_048


def run(model: Path, text: Path, folder: Path, *, repeats: int = 3) -> list[Ratio]:
    """Both in turns."""

    def rate(executor: str) -> float:
        out = folder / f"ray-{executor}"
        shutil.rmtree(out, ignore_errors=True)
        planned = actstore.plan(
            model=str(model),
            tokens=str(text),
            hooks="blocks.15.hook_resid_post",
            context_length=128,
            batch_size=8,
            dtype="bfloat16",
            max_tokens=N_TOKENS,
            out=str(out),
        )
        return actstore.extract(planned, executor=executor, num_workers=1).tokens_per_second

    a, b = in_turns(lambda: rate("ray"), lambda: rate("inline"), repeats=repeats)
    return [Ratio("Ray, 1 worker, SmolLM2-135M bf16", a, b, "tokens/s", 0.97, "inline")]
