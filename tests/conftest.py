"""Fixtures for all tests: an S3 server, tiny models, one real model, a text.

Fixtures are made on first use. Tests that need a server process run on one worker of pytest-xdist.
"""

import contextlib
import fcntl
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import pretrained

# Set before anything imports torch, transformers or ray, and inherited by child processes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.pop("TOKENIZERS_PARALLELISM", None)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # workers share the cores; more threads would wait for each other
    os.environ["OMP_WAIT_POLICY"] = "passive"  # those that Ray's workers have do so without taking a core
else:
    os.environ.setdefault("OMP_NUM_THREADS", "2")

_BUCKET = "actstore-tests"
_SERVER_START_S = 60.0
_SERVER_STOP_S = 15.0
_SERVER_STARTS = 5
_CACHE = Path(__file__).parents[1] / ".cache"
_SERVICES = ("ray", "s3")
_LONG = (
    "tests/test_readme.py",
    "tests/query/server/sending/test_lent_batches.py",
    "tests/query/server/test_limits.py",
    "tests/query/client/test_liar.py",
    "tests/query/server/connections/test_connections.py",
    "tests/query/server/memory/test_memory.py",
    "tests/integrations/test_saelens_training.py",
    "tests/extraction/test_extract.py",
)
"""Files whose tests take longest. They start first, so that none of them ends last."""

TinyModel = Callable[..., Path]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Leave what is imported for all tests to no garbage collection: it is most of what the process holds, it is kept
    until the end, and to look through it takes half a second each time.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the fixtures they use, and group those that one worker of pytest-xdist should run: all that need
    Ray, all that need S3, and otherwise those of a file, so that shared fixtures are made once. The longest groups go
    first.
    """
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        if "s3_server" in fixtures:
            item.add_marker(pytest.mark.s3)
        if "smollm2" in fixtures:
            item.add_marker(pytest.mark.smollm2)
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_group(item)))
    items.sort(key=_turn)


def _group(item: pytest.Item) -> str:
    for service in _SERVICES:
        if item.get_closest_marker(service):
            return service
    return item.nodeid.partition("::")[0]


def _turn(item: pytest.Item) -> int:
    group = item.get_closest_marker("xdist_group")
    assert group is not None
    return (*_SERVICES, *_LONG, group.args[0]).index(group.args[0])


@dataclass(frozen=True)
class S3Server:
    """A SeaweedFS server on the loopback interface."""

    endpoint: str
    bucket: str

    def client(self) -> Any:
        """A botocore client of the administrator, to look at objects without actstore."""
        import botocore.session  # type: ignore[import-untyped]

        return botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id="admin",
            aws_secret_access_key="secret",
        )


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Start the server, and put its address and the credentials ``admin``/``secret`` into the environment.

    The credentials ``reader``/``secret`` may read and list, not write.
    """
    import botocore.session

    with tempfile.TemporaryDirectory(prefix="weed-", ignore_cleanup_errors=True) as folder:
        server, process = _ready_weed(Path(folder))
        with contextlib.ExitStack() as stack:
            stack.callback(_stop, process)
            environment = stack.enter_context(pytest.MonkeyPatch.context())
            # Each new client would parse the descriptions of Amazon's services again, which takes a tenth of a second.
            environment.setattr(
                botocore.session, "create_loader", functools.cache(botocore.session.create_loader)
            )
            for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
                environment.delenv(name, raising=False)
            for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
                environment.setenv(name, os.devnull)
            environment.setenv("AWS_ENDPOINT_URL", server.endpoint)
            environment.setenv("AWS_ACCESS_KEY_ID", "admin")
            environment.setenv("AWS_SECRET_ACCESS_KEY", "secret")
            environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
            environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
            yield server


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    """An empty prefix on S3 that nothing else uses."""
    return f"s3://{s3_server.bucket}/{uuid.uuid4().hex}"


def _ready_weed(folder: Path) -> tuple[S3Server, "subprocess.Popen[bytes]"]:
    """Start the server until it answers: a port that was free a moment ago may be another process's by then."""
    for attempt in range(_SERVER_STARTS):
        place = folder / str(attempt)
        place.mkdir()
        server, process = _start_weed(place)
        try:
            _make_bucket(server, process, place)
        except BaseException:
            _stop(process)
            if attempt == _SERVER_STARTS - 1 or "address already in use" not in (place / "log").read_text():
                raise
        else:
            return server, process
    raise AssertionError


def _start_weed(folder: Path) -> tuple[S3Server, "subprocess.Popen[bytes]"]:
    rights = {"admin": ["Admin", "Read", "Write", "List"], "reader": ["Read", "List"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": "secret"}], "actions": actions}
        for name, actions in rights.items()
    ]
    config = folder / "identities.json"
    config.write_text(json.dumps({"identities": identities}))
    data = folder / "data"
    data.mkdir()
    services = ("master", "volume", "filer", "s3", "admin")
    names = [f"{service}.{port}" for service in services for port in ("port", "port.grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True))
    command = [
        str(Path(sys.executable).parent / "weed"),
        "-logtostderr=true",  # otherwise it leaves files in /tmp
        "mini",
        f"-dir={data}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-s3.config={config}",
        "-s3.autoCreateBucket=false",
        f"-s3.localSocket={folder}/s3.sock",
        f"-filer.localSocket={folder}/filer.sock",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-master.telemetry=false",
        *(f"-{name}={port}" for name, port in ports.items()),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    return S3Server(f"http://127.0.0.1:{ports['s3.port']}", _BUCKET), process


def _make_bucket(server: S3Server, process: "subprocess.Popen[bytes]", folder: Path) -> None:
    """Create the bucket and an object, repeatedly until both exist: the server is ready then."""
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    client = server.client()
    deadline = time.monotonic() + _SERVER_START_S
    while True:
        try:
            with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket=server.bucket)
            client.put_object(Bucket=server.bucket, Key="ready", Body=b"ready")
            return
        except (BotoCoreError, ClientError) as error:
            if process.poll() is not None or time.monotonic() > deadline:
                log = (folder / "log").read_text(errors="replace")
                raise RuntimeError(f"SeaweedFS did not start: {error}\n{log[-4000:]}") from error
            time.sleep(0.1)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(_SERVER_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_ports(n: int) -> Sequence[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> TinyModel:
    """Make a random model: ``tiny_model("llama")`` returns its folder, with a byte-level BPE tokenizer.

    3 layers, d_model 64, 4 heads (2 of keys and values, where the family can), 300 token ids, context 128,
    float32. ``gpt2``, ``gpt_neo``, ``gptj``, ``gpt_neox``, ``llama``, ``mistral``, ``mixtral``, ``phi``, ``phi3``,
    ``qwen2``, ``qwen2_moe``, ``qwen3``, ``qwen3_moe``, ``opt``, ``gemma``, ``gemma2``, ``gemma3_text``; keywords go
    to the config: ``tiny_model("gpt_neox", use_parallel_residual=False)``. Equal arguments give the same folder.
    """
    folders: dict[str, Path] = {}

    def make(model_type: str, **config: Any) -> Path:
        key = json.dumps([model_type, config], sort_keys=True)
        if key not in folders:
            folder = tmp_path_factory.mktemp(model_type)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # these warnings are not under test
                _save_tiny_model(folder, model_type, config)
                _save_tokenizer(folder, text_file.read_text())
            folders[key] = folder
        return folders[key]

    return make


def _save_tiny_model(folder: Path, model_type: str, config: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = _tiny_config(model_type) | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            # Biases start at 0 and norms at 1, which would hide errors, so noise is added. Matrices are only
            # noise.
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    model.to(torch.float32).save_pretrained(folder)


def _tiny_config(model_type: str) -> dict[str, Any]:
    """The fields of the config. Sliding windows are the family's default: none, or longer than the context."""
    shape = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    if model_type == "gpt2":
        return shape | {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 128}
    if model_type == "gptj":
        shape |= {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 128}
        return shape | {"n_inner": 128, "rotary_dim": 8}
    shape |= {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 4}
    shape |= {"max_position_embeddings": 128}
    if model_type == "opt":
        return shape | {"ffn_dim": 128, "word_embed_proj_dim": 64, "do_layer_norm_before": True}
    shape |= {"intermediate_size": 128}
    if model_type == "gpt_neo":
        return shape | {"attention_types": [[["global", "local"], 1], [["global"], 1]]}
    if model_type == "gpt_neox":
        return shape
    shape |= {"num_key_value_heads": 2, "head_dim": 16}
    own: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96},
        "qwen2_moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 80,
        },
        "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
        # The contribution of each layer is scaled by the number of layers.
        "minicpm3": {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
        # Attention is not scaled by the width of a head, and scores and logits are large enough to reach their caps.
        "gemma2": {"query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "gemma3_text": {
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    }
    return shape | own.get(model_type, {})


def _save_tokenizer(folder: Path, text: str) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text], trainer)
    special = {"bos_token": "<bos>", "eos_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A folder with SmolLM2-135M-Instruct, bfloat16 safetensors, and its tokenizer; made once, then kept."""
    _CACHE.mkdir(exist_ok=True)
    with (_CACHE / "smollm2.lock").open("w") as lock, warnings.catch_warnings():
        fcntl.flock(lock, fcntl.LOCK_EX)  # other pytest workers wait here while one makes it
        warnings.simplefilter("ignore")
        return pretrained.smollm2()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About the first 300 KB of the bundled text: whole paragraphs, separated by empty lines."""
    from actstore.demo import TEXT_PATH

    text = TEXT_PATH.read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text[: text.index("\n\n", 300_000) + 1], encoding="utf-8")
    return path


@pytest.fixture
def fields(tiny_model: TinyModel, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Fields of a job: 100 sequences of 32 tokens, 4 hooks, 7 segments, the last one short."""
    return {
        "model": str(tiny_model("llama")),
        "tokens": str(text_file),
        "documents": "paragraph",
        "hooks": ["blocks.*.hook_resid_post", "blocks.1.hook_mlp_out"],
        "context_length": 32,
        "max_tokens": 100 * 32,
        "batch_size": 8,
        "segment_size": 16,
        "out": str(tmp_path / "store"),
    }


@pytest.fixture
def options(fields: dict[str, Any]) -> list[str]:
    """The fields of the job as options of the command line."""
    arguments = []
    for name, value in fields.items():
        arguments += [
            f"--{name.replace('_', '-')}",
            ",".join(value) if isinstance(value, list) else str(value),
        ]
    return arguments
