"""Writing when the model costs almost nothing: inline extraction against SAELens' cache writer."""

import multiprocessing
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import actstore
from tests.benchmarks.measure import Ratio, in_turns

D_MODEL = 2048
CONTEXT = 128
N_SEQUENCES = 1024
N_SEQUENCES_SAELENS = 128
"""It is ten times slower; its rate does not depend on the length of the run."""


def make_model(folder: Path) -> Path:
    """One Llama layer of width 2,048 whose attention and MLP are as small as they go."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(
        "llama",
        num_hidden_layers=1,
        hidden_size=D_MODEL,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=16,
        vocab_size=1000,
        max_position_embeddings=CONTEXT,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {f"t{index}": index for index in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="t0", eos_token="t1", pad_token="t1"
    ).save_pretrained(folder)
    return folder


def saelens(model: Path, module: str, ids: np.ndarray[Any, Any], out: Path) -> float:
    """Bytes/s of activations of a module through `CacheActivationsRunner`."""
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    shutil.rmtree(out, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = Dataset.from_dict({"input_ids": ids[:N_SEQUENCES_SAELENS].tolist()})
        config = CacheActivationsRunnerConfig(
            dataset_path="unused",
            model_name=str(model),
            model_class_name="AutoModelForCausalLM",
            hook_name=module,
            d_in=D_MODEL,
            training_tokens=N_SEQUENCES_SAELENS * CONTEXT,
            context_size=CONTEXT,
            model_batch_size=8,
            dtype="float32",
            device="cpu",
            prepend_bos=False,
            streaming=False,
            buffer_size_gb=0.05,
            new_cached_activations_path=str(out),
        )
        runner = CacheActivationsRunner(config, override_dataset=dataset)
        started = time.perf_counter()
        n_sequences = len(runner.run())  # it fills its last buffer, so it writes more than it was asked for
        seconds = time.perf_counter() - started
    return n_sequences * CONTEXT * D_MODEL * 4 / seconds


def _in_a_process_of_its_own(model: Path, module: str, ids: np.ndarray[Any, Any], out: Path) -> float:
    """MB/s; our worker changes how the heap of its process behaves, and the peer must not gain or lose by that."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(saelens, model, module, ids, out).result() / 1e6


def run(folder: Path, *, repeats: int = 3) -> list[Ratio]:
    """Both in turns."""
    model = make_model(folder / "storage-model")
    ids = np.random.default_rng(0).integers(2, 1000, size=(N_SEQUENCES, CONTEXT))
    tokens = folder / "storage-tokens.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), tokens)

    def ours(hook: str) -> float:
        out = folder / "storage"
        shutil.rmtree(out, ignore_errors=True)
        planned = actstore.plan(
            model=str(model),
            tokens=str(tokens),
            hooks=hook,
            context_length=CONTEXT,
            batch_size=8,
            dtype="float32",
            out=str(out),
        )
        return actstore.extract(planned).nbytes_per_second / 1e6

    ratios = []
    for name, hook, module in (
        (
            "1 layer, d=2048, float32: before the layer (storage-bound)",
            "blocks.0.hook_resid_pre",
            "model.embed_tokens",
        ),
        ("1 layer, d=2048, float32: after the layer", "blocks.0.hook_resid_post", "model.layers.0"),
    ):
        a, b = in_turns(
            partial(ours, hook),
            partial(_in_a_process_of_its_own, model, module, ids, folder / "saelens"),
            repeats=repeats,
        )
        ratios.append(Ratio(name, a, b, "MB/s", 10, "SAELens CacheActivationsRunner"))
    return ratios
