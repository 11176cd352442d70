"""The main job on real parts: SmolLM2-135M over Shakespeare, to S3 by Ray with two workers and to disk inline."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import tensorstore
import torch
from transformers import AutoModelForCausalLM

import actstore
from actstore.demo import TEXT_PATH

LAYERS = (0, 2, 4)


def job(model: Path, length: int, n_tokens: int, dtype: str, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model),
        "tokens": str(TEXT_PATH),
        "documents": "paragraph",
        "hooks": [f"blocks.{layer}.hook_resid_post" for layer in LAYERS],
        "context_length": length,
        "batch_size": 8,
        "max_tokens": n_tokens,
        "dtype": dtype,
    } | more


def contents(url: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(url)
    files = fs.find(root)
    return {path[len(root) :].lstrip("/"): fs.cat_file(path) for path in files}


def sampled_rows_of_the_plain_forward(
    store: actstore.Store, model: Any, batch: int
) -> dict[str, torch.Tensor]:
    """The values of one batch from transformers alone, with its language-model head and all its layers."""
    request = store.plan.request
    rows = store.tokens[batch * request.batch_size : (batch + 1) * request.batch_size]
    filled = np.concatenate([rows, rows[-1:].repeat(request.batch_size - len(rows), axis=0)])
    with torch.inference_mode():
        states = model(torch.from_numpy(filled).long(), output_hidden_states=True).hidden_states
    return {f"blocks.{layer}.hook_resid_post": states[layer + 1][: len(rows)] for layer in LAYERS}


def check(local: str, remote: str, endpoint: str) -> None:
    on_disk, on_s3 = contents(local), contents(remote)
    assert sorted(on_disk) == sorted(on_s3)
    assert all(on_disk[key] == on_s3[key] for key in on_disk)

    for url in (local, remote):
        store = actstore.open(url)
        assert store.is_complete
        for hook in store.hooks:
            ours = store[hook].numpy().view(np.uint16)  # bits, whatever the type
            assert np.array_equal(np.asarray(store[hook].zarr[...]).view(np.uint16), ours)
            by_tensorstore = tensorstore.open(spec(url, hook, endpoint)).result().read().result()
            assert np.array_equal(by_tensorstore.view(np.uint16), ours)

    store = actstore.open(local)
    request = store.plan.request
    model = AutoModelForCausalLM.from_pretrained(
        request.model.name, dtype=getattr(torch, request.dtype)
    ).eval()
    n_batches = -(-store.shape[0] // request.batch_size)
    for batch in (0, n_batches // 2, n_batches - 1):
        start = batch * request.batch_size
        for hook, want in sampled_rows_of_the_plain_forward(store, model, batch).items():
            assert torch.equal(store[hook][start : start + len(want)], want), (hook, batch)


def spec(url: str, hook: str, endpoint: str) -> dict[str, Any]:
    if not url.startswith("s3://"):
        return {"driver": "zarr3", "kvstore": f"file://{url}/acts/{hook}/"}
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    store = {"driver": "s3", "bucket": bucket, "endpoint": endpoint, "aws_region": "us-east-1"}
    return {"driver": "zarr3", "kvstore": store | {"path": f"{prefix}/acts/{hook}/"}}


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.parametrize(
    ("length", "n_tokens", "dtype"),
    # CPUs without bfloat16 emulate it, so its batches are short; there are three, and the last one is not full.
    [(16, 350, "bfloat16"), pytest.param(128, 100_096, "float32", marks=pytest.mark.soak)],
    ids=["350 tokens", "100k tokens"],
)
def test_ray_to_s3_equals_inline_to_disk(
    smollm2: Path, s3_server: Any, s3_url: str, tmp_path: Path, length: int, n_tokens: int, dtype: str
) -> None:
    local = str(tmp_path / "store")
    inline = actstore.extract(actstore.plan(**job(smollm2, length, n_tokens, dtype, out=local)))
    on_ray = actstore.extract(
        actstore.plan(**job(smollm2, length, n_tokens, dtype, out=s3_url)), executor="ray", num_workers=2
    )
    assert inline.n_tokens_computed == on_ray.n_tokens_computed == n_tokens // length * length
    check(local, s3_url, s3_server.endpoint)
