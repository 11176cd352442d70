"""Writing when the model costs almost nothing: inline extraction compared with the disk, the forward, and SAELens'
writer.
"""

import mmap
import multiprocessing
import os
import shutil
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

import actstore
from tests.benchmarks.measure import Against, Result, Side, Speed, Work, interleaved, timed

D_MODEL = 2048
CONTEXT = 128
BATCH = 8
_STEP = 64 << 20
N_SEQUENCES = 1024
_SEQUENCE_NBYTES = CONTEXT * D_MODEL * 4
N_SEQUENCES_SAELENS = 128
"""SAELens is ten times slower; its rate does not depend on the length of the run."""


def make_model(folder: Path) -> Path:
    """Save one Llama layer of width 2,048 whose attention and MLP are as small as possible."""
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


def saelens(model: Path, module: str, ids: np.ndarray[Any, Any], out: Path) -> Work:
    """The bytes of a module's activations through `CacheActivationsRunner`."""
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
        n_sequences = len(runner.run())  # it fills its last buffer, so it writes more than requested
        seconds = time.perf_counter() - started
    return Work(n_sequences * _SEQUENCE_NBYTES, seconds)


def _forward(model: Path, ids: np.ndarray[Any, Any]) -> Side:
    """The bytes of the output of the plain model's layer, which are not kept."""
    from transformers import AutoModel

    base = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokens = torch.from_numpy(ids[:BATCH])

    def forward() -> float:
        with torch.inference_mode():
            base(input_ids=tokens, use_cache=False)
        return BATCH * _SEQUENCE_NBYTES

    return timed(forward)


def _raw_file(path: Path) -> Side:
    """The bytes of a file as large as a run, written past the page cache."""
    data = mmap.mmap(-1, N_SEQUENCES * _SEQUENCE_NBYTES)
    np.frombuffer(data, np.uint8)[:] = 1

    def write() -> float:
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o644)
        nbytes = sum(
            os.write(descriptor, memoryview(data)[at : at + _STEP]) for at in range(0, len(data), _STEP)
        )
        os.fsync(descriptor)
        os.close(descriptor)
        return nbytes

    return timed(write)


def run(folder: Path) -> list[Result]:
    """Measure all sides in turns; the peer in a separate process, since our worker changes the heap of its process."""
    model = make_model(folder / "storage-model")
    ids = np.random.default_rng(0).integers(2, 1000, size=(N_SEQUENCES, CONTEXT))
    tokens = folder / "storage-tokens.parquet"
    pq.write_table(pa.table({"input_ids": ids.tolist()}), tokens)

    def ours(hook: str) -> Work:
        out = folder / "storage"
        shutil.rmtree(out, ignore_errors=True)
        planned = actstore.plan(
            model=str(model),
            tokens=str(tokens),
            hooks=hook,
            context_length=CONTEXT,
            batch_size=BATCH,
            dtype="float32",
            out=str(out),
        )
        report = actstore.extract(planned)
        return Work(report.nbytes_written, report.seconds_running)

    raw = folder / "storage-raw"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:

        def theirs(module: str) -> Work:
            return process.submit(saelens, model, module, ids, folder / "saelens").result()

        rates = interleaved(
            {
                "before": lambda: ours("blocks.0.hook_resid_pre"),
                "saelens before": lambda: theirs("model.embed_tokens"),
                "raw": _raw_file(raw),
                "after": lambda: ours("blocks.0.hook_resid_post"),
                "saelens after": lambda: theirs("model.layers.0"),
                "forward": _forward(model, ids),
            }
        )
    raw.unlink()
    peer = "SAELens CacheActivationsRunner"
    disk = Against("raw file, direct, fsync", rates["raw"], 0.5, is_limit=True)
    forward = Against("bare forward of the layer, kept nowhere", rates["forward"], 0.5, is_limit=True)
    name = "1 layer, d=2048, float32, with statistics"
    before, after = f"{name}: before the layer (storage-bound)", f"{name}: after the layer"
    return [
        Speed(before, "MB/s", rates["before"], (disk, Against(peer, rates["saelens before"], 5)), 1e6),
        Speed(after, "MB/s", rates["after"], (forward, Against(peer, rates["saelens after"], 3)), 1e6),
    ]
