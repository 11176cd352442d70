"""Writing when the model costs almost nothing: inline extraction against SAELens' cache writer."""

import shutil
import time
import warnings
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


def saelens(model: Path, ids: np.ndarray[Any, Any], out: Path) -> float:
    """Bytes/s of activations through `CacheActivationsRunner`."""
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
            hook_name="model.layers.0",
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
        runner.run()
        seconds = time.perf_counter() - started
    return N_SEQUENCES_SAELENS * CONTEXT * D_MODEL * 4 / seconds


def run(folder: Path, *, repeats: int = 3) -> list[Ratio]:
    """Both in turns."""
    model = make_model(folder / "storage-model")
    ids = np.random.default_rng(0).integers(2, 1000, size=(N_SEQUENCES, CONTEXT))
    tokens = folder / "storage-tokens.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), tokens)

    def ours() -> float:
        out = folder / "storage"
        shutil.rmtree(out, ignore_errors=True)
        planned = actstore.plan(
            model=str(model),
            tokens=str(tokens),
            hooks="blocks.0.hook_resid_post",
            context_length=CONTEXT,
            batch_size=8,
            dtype="float32",
            out=str(out),
        )
        return actstore.extract(planned).nbytes_per_second / 1e6

    a, b = in_turns(ours, lambda: saelens(model, ids, folder / "saelens") / 1e6, repeats=repeats)
    name = "storage-bound: 1 layer, d=2048, float32"
    return [Ratio(name, a, b, "MB/s", 10, "SAELens CacheActivationsRunner")]
