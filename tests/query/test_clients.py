"""Clients that know nothing of actstore, and trainers, get the bits of the files from a running server."""

import io
import json
import shlex
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from email.message import Message
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import pyarrow as pa
import pytest
import safetensors.torch
import tensorstore
import torch
import xarray as xr
import zarr
from torch.utils.data import DataLoader

import actstore
from actstore.demo import MODEL_PATH
from actstore.facade import Store
from actstore.integrations.torch_dataset import ActivationDataset
from tests.commands import FORKS, start_server
from tests.query.running import Running, running
from tests.query.stores import COMPRESSED, GROWN, NAMES, SLOTS, TEXT, WHOLE
from tests.query.test_conformance import bits, flat
from tests.store.example import HOOKS, LENGTH, N

pytestmark = pytest.mark.s3

RESID, OTHER, Z = HOOKS
TOKENS: Final = ("tokens", "lengths", "documents", "offsets")
HALF: Final = ("blocks.0.hook_mlp_out", "blocks.0.hook_attn_out")
"""Hooks of the grown store that are not committed for all sequences."""


@pytest.fixture(scope="module", params=["disk", "s3"])
def served(request: pytest.FixtureRequest) -> Running:
    server: Running = request.getfixturevalue("server" if request.param == "disk" else "s3_served")
    return server


@pytest.fixture(scope="module")
def local(stores: Path) -> dict[str, Store]:
    return {name: actstore.open(stores / name) for name in NAMES}


class Answer:
    """A reply, whatever its status."""

    def __init__(self, status: int, headers: Message, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def ask(url: str, *, method: str = "GET", json_body: Any = None, **headers: str) -> Answer:
    """Send a request; headers are named as ``If_None_Match``."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = None if json_body is None else json.dumps(json_body).encode()
    if data is not None:
        named["Content-Type"], method = "application/json", "POST"
    request = urllib.request.Request(url, data, named, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return Answer(reply.status, reply.headers, reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, error.headers, error.read())


def slice_url(server: Running, hook: str = RESID, store: str = WHOLE, **query: str) -> str:
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{server.url}/v1/stores/{store}/hooks/{hook}/slice?{asked}"


def zarr_url(server: Running, name: str) -> str:
    return f"{server.url}/v1/stores/{name}/zarr"


def whole_hooks(store: Store) -> list[str]:
    return [hook for hook in store.hooks if hook not in HALF]


@pytest.mark.parametrize("name", NAMES)
def test_zarr(name: str, served: Running, local: dict[str, Store]) -> None:
    ours = local[name]
    group = zarr.open_group(zarr_url(served, name), mode="r")
    assert isinstance(group.store, zarr.storage.FsspecStore)
    acts = group["acts"]
    assert isinstance(acts, zarr.Group)
    assert sorted(acts.array_keys()) == sorted(ours.hooks)
    assert sorted(group.array_keys()) == sorted(TOKENS)
    for hook in whole_hooks(ours):
        array = acts[hook]
        assert isinstance(array, zarr.Array)
        assert bits(np.asarray(array[...])) == bits(ours[hook].numpy(slice(0, N)))
        assert bits(np.asarray(array[5:21, -1])) == bits(ours[hook].numpy(slice(0, N))[5:21, -1])
    for token_array in TOKENS:
        assert bits(np.asarray(group[token_array])) == bits(getattr(ours, token_array)[:N])


def test_rows_that_are_not_committed_are_no_fill_values(served: Running, local: dict[str, Store]) -> None:
    group: Any = zarr.open_group(zarr_url(served, GROWN), mode="r")
    dataset = xr.open_zarr(zarr_url(served, GROWN), group="acts")
    for hook in HALF:
        assert bits(np.asarray(group["acts"][hook][:16])) == bits(local[GROWN][hook].numpy(slice(0, 16)))
        for missing in (slice(16, 32), slice(None), slice(20, 21)):
            with pytest.raises(aiohttp.ClientResponseError, match="409"):
                group["acts"][hook][missing]
            with pytest.raises(aiohttp.ClientResponseError, match="409"):
                dataset[hook][missing].load()
        assert bits(np.asarray(group["acts"][hook][32:])) == bits(local[GROWN][hook].numpy(slice(32, N)))


@pytest.mark.parametrize("name", NAMES)
def test_xarray(name: str, served: Running, local: dict[str, Store]) -> None:
    ours = local[name]
    for opened in (
        xr.open_zarr(zarr_url(served, name)),
        xr.open_dataset(zarr_url(served, name), engine="zarr"),
    ):
        assert sorted(opened) == sorted(TOKENS)
        for token_array in TOKENS:
            assert bits(opened[token_array].values) == bits(getattr(ours, token_array)[:N])
        assert opened["tokens"].dims == ("sequence", "position")
    acts = xr.open_zarr(zarr_url(served, name), group="acts")
    assert sorted(acts) == sorted(ours.hooks)
    for hook in whole_hooks(ours):
        assert acts[hook].dims == ours[hook].axes
        assert bits(acts[hook].values) == bits(ours[hook].numpy(slice(0, N)))


@pytest.mark.parametrize("name", [WHOLE, COMPRESSED])
def test_tensorstore(name: str, served: Running, local: dict[str, Store]) -> None:
    ours = local[name]
    for path, expected in [
        *((f"acts/{hook}", ours[hook].numpy(slice(None))) for hook in ours.hooks),
        *((name, getattr(ours, name)[:]) for name in TOKENS),
    ]:
        kvstore = {"driver": "http", "base_url": f"{zarr_url(served, name)}/{path}/"}
        array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
        assert bits(array.read().result()) == bits(expected)
        assert bits(array[7:30].read().result()) == bits(expected[7:30])


def test_tensorstore_of_rows_that_are_not_committed(served: Running) -> None:
    kvstore = {"driver": "http", "base_url": f"{zarr_url(served, GROWN)}/acts/{HALF[0]}/"}
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    with pytest.raises(ValueError, match="409"):
        array[16:32].read().result()


@pytest.mark.parametrize("name", [WHOLE, COMPRESSED])
def test_safetensors(name: str, served: Running, local: dict[str, Store]) -> None:
    ours = local[name]
    for hook in ours.hooks:
        url = slice_url(served, hook, name, seq="3:36", pos="2:7")
        tensors = safetensors.torch.load(ask(url, Accept="application/x-safetensors").body)
        assert list(tensors) == [hook]
        assert bits(tensors[hook]) == bits(ours[hook][3:36, 2:7])
    asked = {"hooks": ["blocks.*.hook_resid_post", Z, "tokens", "lengths"], "sequences": [30, 2, 2]}
    reply = ask(f"{served.url}/v1/stores/{name}/select", json_body=asked)
    tensors = safetensors.torch.load(reply.body)
    assert sorted(tensors) == sorted([*HOOKS, "tokens", "lengths"])
    for hook in HOOKS:
        assert bits(tensors[hook]) == bits(ours[hook][[30, 2, 2]])
    assert bits(tensors["tokens"]) == bits(ours.tokens[[30, 2, 2]])
    assert bits(tensors["lengths"]) == bits(ours.lengths[[30, 2, 2]])


def same_values(values: Any, expected: torch.Tensor) -> bool:
    """Whether values are equal as float32, with NaN where there is NaN, as conversions change the bits of NaN."""
    return bool(np.array_equal(values, expected.float().numpy(), equal_nan=True))


@pytest.mark.parametrize("name", [WHOLE, COMPRESSED, GROWN])
def test_npy(name: str, served: Running, local: dict[str, Store]) -> None:
    for hook in (RESID, Z):
        values = np.load(io.BytesIO(ask(slice_url(served, hook, name, seq="5:21", format="npy")).body))
        expected = local[name][hook][5:21]
        if name == WHOLE:
            assert values.dtype == np.float32
            assert same_values(values, expected)
        else:
            assert bits(values) == bits(expected)


@pytest.mark.parametrize("name", [WHOLE, COMPRESSED, GROWN])
def test_arrow(name: str, served: Running, local: dict[str, Store]) -> None:
    for hook in (RESID, Z):
        url = slice_url(served, hook, name, seq="5,30,9", pos="::3")
        with pa.ipc.open_stream(ask(url, Accept="application/vnd.apache.arrow.stream").body) as reader:
            table: Any = reader.read_all()
        expected = local[name][hook][[5, 30, 9], ::3]
        assert table["sequence"].to_pylist() == [sequence for sequence in (5, 30, 9) for _ in (0, 3, 6)]
        assert table["position"].to_pylist() == [0, 3, 6] * 3
        field = table.schema.field(hook)
        shape = tuple(map(int, field.metadata[b"actstore.shape"].split(b",")))
        assert shape == tuple(expected.shape[2:])
        assert field.metadata[b"actstore.dtype"].decode() == str(expected.dtype).removeprefix("torch.")
        values = table[hook].combine_chunks().flatten().to_numpy().reshape(3, 3, *shape)
        if name == WHOLE:
            assert values.dtype == np.float32
            assert same_values(values, expected)
        else:
            assert bits(values) == bits(expected)


def test_json(served: Running, local: dict[str, Store]) -> None:
    document = json.loads(ask(slice_url(served, Z, seq="5,30", pos="-1"), Accept="application/json").body)
    expected = local[WHOLE][Z][[5, 30]][:, [LENGTH - 1]]
    assert document["shape"] == list(expected.shape)
    assert (document["name"], document["dtype"]) == (Z, "bfloat16")
    assert (document["sequences"], document["positions"]) == ([5, 30], [LENGTH - 1])
    # NaN and infinities, which JSON has no numbers for, are strings.
    assert same_values(np.array(document["values"], np.float32), expected)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_slots_are_called_slots(served: Running) -> None:
    answer = json.loads(ask(slice_url(served, store=SLOTS, seq="2:4", pos="0:2", format="json")).body)
    assert (answer["positions"], answer["slots"]) == (None, [0, 1])
    assert answer["shape"] == [2, 2, 16]
    positions = json.loads(ask(slice_url(served, "positions", SLOTS, seq="2:4", format="json")).body)
    assert positions["values"] == TEXT.positions[2:4].tolist()
    table = pa.ipc.open_stream(ask(slice_url(served, store=SLOTS, seq="2:4", format="arrow")).body).read_all()
    assert table.schema.names[:2] == ["sequence", "slot"]
    refused = ask(slice_url(served, "positions", WHOLE))
    assert refused.status == 404
    assert "has all positions of its sequences" in json.loads(refused.body)["detail"]


def test_a_pipeline_of_the_shell(served: Running, local: dict[str, Store]) -> None:
    program = (
        "import sys, numpy; "
        "found = numpy.frombuffer(sys.stdin.buffer.read(), '<f4').reshape(-1, 8, 16); "
        "print(found.shape, found.view('<u4').sum(dtype='u8'))"
    )
    url = shlex.quote(slice_url(served, store=COMPRESSED, seq="4:20"))
    pipeline = f"curl -s {url} | {shlex.quote(sys.executable)} -c {shlex.quote(program)}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", pipeline], capture_output=True, text=True, check=True
    )
    expected = local[COMPRESSED][RESID].numpy(slice(4, 20))
    assert done.stdout == f"{expected.shape} {expected.view('<u4').sum(dtype='u8')}\n"


@pytest.mark.parametrize("form", ["raw", "safetensors", "npy", "arrow", "json"])
def test_a_slice_is_not_sent_twice(form: str, served: Running) -> None:
    url = slice_url(served, seq="5:21", format=form)
    whole = ask(url)
    tag = whole.headers["ETag"]
    assert int(whole.headers["Content-Length"]) == len(whole.body)
    for known in (tag, f'"other", W/{tag}', "*"):
        again = ask(url, If_None_Match=known)
        assert (again.status, again.body, again.headers["ETag"]) == (304, b"", tag)
    assert ask(url, If_None_Match='"other"').body == whole.body
    others = [ask(slice_url(served, seq=seq, format=form)).headers["ETag"] for seq in ("5:22", "5:21:2")]
    assert len({tag, *others}) == 3


RANGES: Final = ("0-9", "40-", "-7", "31-31", "17-100000000")


def check_ranges(url: str, whole: Answer) -> None:
    """Check parts of a body, under its ETag and under another one."""
    n = len(whole.body)
    for text in RANGES:
        first, _, last = text.partition("-")
        start = int(first) if first else n - int(last)
        stop = min(n, int(last) + 1) if first and last else n
        part = ask(url, Range=f"bytes={text}")
        assert (part.status, part.body) == (206, whole.body[start:stop]), text
        assert part.headers["Content-Range"] == f"bytes {start}-{stop - 1}/{n}"
        assert part.headers["ETag"] == whole.headers["ETag"]
        same = ask(url, Range=f"bytes={text}", If_Range=whole.headers["ETag"])
        assert (same.status, same.body) == (206, part.body)
        changed = ask(url, Range=f"bytes={text}", If_Range='"other"')
        assert (changed.status, changed.body) == (200, whole.body)
    beyond = ask(url, Range=f"bytes={n}-")
    assert (beyond.status, beyond.headers["Content-Range"]) == (416, f"bytes */{n}")
    assert json.loads(beyond.body)["type"] == "urn:actstore:problem:range"


@pytest.mark.parametrize("form", ["raw", "safetensors", "npy", "arrow", "json"])
@pytest.mark.parametrize("name", [WHOLE, COMPRESSED])
def test_ranges_of_slices(name: str, form: str, served: Running) -> None:
    url = slice_url(served, Z, name, seq="5:21:3", format=form)
    check_ranges(url, ask(url))


KEYS: Final = (
    "zarr.json",
    "acts/zarr.json",
    f"acts/{RESID}/c.1.0.0",
    "tokens/c.0.0",
    "_actstore/manifest.json",
)


@pytest.mark.parametrize("key", KEYS)
def test_objects(key: str, served: Running, stores: Path) -> None:
    url = f"{zarr_url(served, WHOLE)}/{key}"
    whole = ask(url)
    assert whole.status == 200
    if key != "zarr.json":  # zarr.json has the metadata of all others in it
        assert whole.body == (stores / WHOLE / key).read_bytes()
    check_ranges(url, whole)
    head = ask(url, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    for field in ("Content-Length", "Content-Type", "ETag", "Accept-Ranges"):
        assert head.headers[field] == whole.headers[field], field
    assert ask(url, If_None_Match=whole.headers["ETag"]).status == 304
    assert ask(url, method="HEAD", If_None_Match=whole.headers["ETag"]).status == 304
    assert ask(f"{url}x", method="HEAD").status == 404


def test_a_store_that_may_change_has_no_tags_of_slices(served: Running) -> None:
    reply = ask(slice_url(served, HALF[0], GROWN, seq="0:16"))
    assert reply.status == 200
    assert reply.headers["ETag"] is None


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_of_torch(server: Running, local: dict[str, Store]) -> None:
    options: dict[str, Any] = {"batch_size": 30, "shuffle": "window", "window_rows": 100, "epochs": 2}
    options |= {"drop": [3, 9], "provenance": True}
    dataset = ActivationDataset(server.store(WHOLE, direct=False), RESID, **options)
    start_server()
    workers = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=FORKS)
    with local[WHOLE].loader(RESID, **options) as ours:
        expected = [flat(batch) for batch in ours]
    assert [flat(batch) for batch in workers] == expected
    assert len(expected) == 2 * dataset.n_batches


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Iterator[tuple[Store, Store]]:
    """Activations of the bundled model, in a store on disk and over HTTP."""
    with warnings.catch_warnings():
        # Warnings during its import are not under test.
        warnings.simplefilter("ignore")
        import sae_lens  # noqa: F401
    folder = tmp_path_factory.mktemp("saelens")
    job = actstore.plan(
        model=str(MODEL_PATH),
        tokens=str(text_file),
        documents="paragraph",
        hooks=["blocks.2.hook_resid_post", "blocks.1.attn.hook_z"],
        context_length=32,
        max_tokens=128 * 32,
        batch_size=32,
        segment_size=32,
        out=str(folder / "store"),
    )
    actstore.extract(job)
    with running(folder, str(folder / "store")) as server:
        yield actstore.open(folder / "store"), server.store("store", direct=False)


def test_saelens_trains_the_same(trained_on: tuple[Store, Store], tmp_path: Path) -> None:
    """Once without, and once with a stop in the middle."""
    from tests.integrations.saes import StoppedError

    here, there = trained_on
    whole = train(here, tmp_path / "here")
    assert train(there, tmp_path / "there") == whole
    with pytest.raises(StoppedError):
        train(there, tmp_path / "stopped", stop_at=27)
    checkpoint = max((tmp_path / "stopped").iterdir(), key=lambda path: int(path.name))
    n_before = int(checkpoint.name) // 256
    assert 0 < n_before < 27
    resumed = train(there, tmp_path / "stopped", resume_from=checkpoint)
    assert resumed == (whole[0][n_before:], *whole[1:])


def train(
    store: Store, folder: Path, *, stop_at: int | None = None, resume_from: Path | None = None
) -> tuple[list[str], str, str]:
    """Checksums of each batch, of the weights and of the sparsity."""
    from sae_lens.training.sae_trainer import SAETrainer

    from actstore.integrations.saelens import data_provider, prepare, resume, save_checkpoint_fn
    from tests.integrations.saes import BATCH, RESID, Recorded, checksum, sae_of, trainer_config

    torch.manual_seed(0)
    options: Any = {"seed": 3, "drop": ["bos"], "shuffle": "window", "window_rows": 1024}
    with data_provider(store, RESID, batch_size=BATCH, **options) as provider:
        data = Recorded(provider, stop_at)
        trainer: Any = SAETrainer(
            trainer_config(folder), sae_of("standard"), data, save_checkpoint_fn=save_checkpoint_fn(provider)
        )
        if resume_from is not None:
            resume(trainer, provider, resume_from)
        prepare(trainer, provider)
        sae = trainer.fit()
    return data.batches, checksum(list(sae.state_dict().values())), checksum([trainer.act_freq_scores])


def test_saelens_in_one_call(trained_on: tuple[Store, Store]) -> None:
    from actstore.integrations.saelens import train_sae
    from tests.integrations.saes import HEADS, sae_of, trainer_config

    weights = []
    for store in trained_on:
        cfg = trainer_config(n_steps=8)
        trained = train_sae(store, HEADS, cfg, sae=sae_of("topk").cfg, seed=5)
        weights.append({name: bits(value) for name, value in trained.state_dict().items()})
    assert weights[0] == weights[1]
