"""Dashboards of 1,000 features of a TopK SAE, from a store, compared with SAEDashboard, which runs the model."""

import time
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import actstore
from actstore import analysis
from actstore.demo import TEXT_PATH
from actstore.facade import Store
from tests.benchmarks import sae_dashboard_peer
from tests.benchmarks.measure import Against, Rates, Result, Speed

HOOK: Final = "blocks.7.hook_resid_post"
N_FEATURES: Final = 1000
_N_SEQUENCES: Final = 512
_BATCH: Final = 256
"""Features that SAEDashboard does at once; it runs the model over all tokens for each such batch."""
_SIZES: Final = (16, 64)
"""Sequences of the two runs of SAEDashboard from which the time of more of them follows."""
_ROWS: Final = 1_000_000


def run(model: Path, folder: Path) -> list[Result]:
    """Measure our rate over all rows, and that of SAEDashboard for 10^6 rows from two sizes of one batch of features.

    What is the same for any number of rows is in our rate as if it grew with them, and in theirs only once.
    """
    store = _store(model, folder)
    sae = _sae(store, folder / "sae")
    hooked = actstore.HookedModel.from_pretrained(str(model), dtype="float32", device="cpu")
    analysis.dashboard(
        store, HOOK, sae, range(8), out=str(folder / "warm"), model=hooked, sequences=slice(64)
    )
    started = time.perf_counter()
    made = analysis.dashboard(store, HOOK, sae, range(N_FEATURES), out=str(folder / "ours"), model=hooked)
    ours = time.perf_counter() - started
    assert made.n_rows == store.shape[0] * store.shape[1]
    assert len(list((folder / "ours/features").iterdir())) == N_FEATURES
    tokens = folder / "tokens.npy"
    np.save(tokens, store.tokens[: max(_SIZES)])
    seconds = sae_dashboard_peer.seconds_of(model, folder / "sae", tokens, HOOK, _BATCH, _SIZES)
    few, many = _SIZES
    a_row = (seconds[many] - seconds[few]) / ((many - few) * store.shape[1])
    theirs = (seconds[few] + a_row * (_ROWS - few * store.shape[1])) * N_FEATURES / _BATCH
    return [
        Speed(
            f"dashboard of {N_FEATURES:,} of 3,072 features of a TopK SAE, SmolLM2-135M {HOOK}, written as pages and "
            f"tables (ours over {made.n_rows:,} rows; SAEDashboard 0.8.0 over 10^6, from {few} and {many} sequences)",
            "rows/s",
            Rates((made.n_rows / ours,), ours),
            (
                Against(
                    "SAEDashboard, the model in the loop", Rates((_ROWS / theirs,), sum(seconds.values())), 25
                ),
            ),
        )
    ]


def _store(model: Path, folder: Path) -> Store:
    planned = actstore.plan(
        model=str(model),
        tokens=str(TEXT_PATH),
        documents="paragraph",
        hooks=[HOOK],
        context_length=128,
        max_tokens=_N_SEQUENCES * 128,
        dtype="float32",
        out=str(folder / "dashboard-store"),
    )
    actstore.extract(planned)
    return actstore.open(str(folder / "dashboard-store"))


def _sae(store: Store, folder: Path) -> Any:
    """A TopK SAE that nobody trained: its latents are all in use, which is more work than those of a trained one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import TopKSAE, TopKSAEConfig

        config = TopKSAEConfig(
            d_in=store[HOOK].shape[-1], d_sae=3072, k=32, rescale_acts_by_decoder_norm=True
        )
        sae: Any = TopKSAE(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        decoder = torch.randn(sae.W_dec.shape, generator=generator)
        sae.W_dec.copy_(decoder / decoder.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(store[HOOK][:64, 1:].flatten(0, 1).mean(0))
    sae.save_model(str(folder))
    return sae
