"""Losses with SAEs in the place of a stored value are those of PyTorch's hooks on a plain model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import actstore
from actstore import analysis, patching
from actstore.analysis.sae_evaluation import losses as losses_module
from actstore.analysis.sae_evaluation.held_out import ByDocument
from actstore.errors import JobError
from actstore.facade import Store
from actstore.hooks.model import HookedModel
from tests.analysis.sae_evaluation.plain import PlainSae
from tests.analysis.sae_evaluation.saes import sae_of

TinyModel = Callable[..., Path]
HOOK, HEADS, D = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z", 64
NAMES = ("loss", "loss_with_sae", "loss_zero", "kl_with_sae", "kl_zero")


@pytest.fixture(scope="module")
def folder(tiny_model: TinyModel) -> Path:
    return tiny_model("llama")


def extracted(folder: Path, text_file: Path, out: Path, **fields: Any) -> Store:
    job = actstore.plan(
        model=str(folder),
        tokens=str(text_file),
        documents="paragraph",
        hooks=[HOOK, HEADS],
        context_length=24,
        max_tokens=60 * 24,
        dtype="float32",
        out=str(out),
        **fields,
    )
    actstore.extract(job)
    return actstore.open(str(out))


@pytest.fixture(scope="module")
def store(folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Documents follow each other in each sequence."""
    return extracted(folder, text_file, tmp_path_factory.mktemp("concat") / "store")


@pytest.fixture(scope="module")
def padded(folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One document in each sequence, with padding, and only some positions stored."""
    out = tmp_path_factory.mktemp("document") / "store"
    return extracted(folder, text_file, out, packing="document", truncate="right", positions="0:9")


def by_hand(
    folder: Path, store: Store, sae: Any, is_read: np.ndarray[Any, Any], is_counted: np.ndarray[Any, Any]
) -> dict[str, float]:
    """Mean losses and divergences, sequence by sequence."""
    plain: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    sums = dict.fromkeys(NAMES, 0.0)
    n_losses = n_predictions = 0
    for number in np.flatnonzero(is_counted[:, :-1].any(1)).tolist():
        length = int(store.lengths[number])
        ids = torch.from_numpy(np.asarray(store.tokens[number, :length]).astype(np.int64))[None]
        read, counted = (torch.from_numpy(mask[number, :length]) for mask in (is_read, is_counted))
        with torch.no_grad():
            stream = plain(ids, output_hidden_states=True).hidden_states[2]
            spliced = torch.where(read[:, None], sae.decode(sae.encode(stream[0])), stream[0])[None]
            put = {"loss": stream, "loss_with_sae": spliced, "loss_zero": torch.zeros_like(stream)}
            logs = {}
            for name, value in put.items():
                handle = plain.model.layers[1].register_forward_hook(lambda _m, _a, _out, value=value: value)
                logs[name] = plain(ids).logits[0].double().log_softmax(-1)
                handle.remove()
                each = -logs[name][:-1].gather(1, ids[0, 1:, None])[:, 0]
                sums[name] += float(each[counted[:-1]].sum())
            for name, other in (("kl_with_sae", "loss_with_sae"), ("kl_zero", "loss_zero")):
                each = (logs["loss"].exp() * (logs["loss"] - logs[other])).sum(-1)
                sums[name] += float(each[counted].sum())
        n_losses += int(counted[:-1].sum())
        n_predictions += int(counted.sum())
    means = {name: sums[name] / (n_predictions if "kl" in name else n_losses) for name in NAMES}
    return means | {"n_tokens": n_losses}


def taken(store: Store) -> np.ndarray[Any, Any]:
    """Positions of which rows are stored, [n_sequences, context_length]."""
    is_stored = np.zeros((len(store.lengths), 24), bool)
    for number, length in enumerate(np.asarray(store.lengths[:]).tolist()):
        is_stored[number, : length if store.positions is None else min(length, 9)] = True
    return is_stored


@pytest.mark.parametrize("of", ["concat", "padded"])
@pytest.mark.parametrize("fraction", [None, 0.4])
def test_losses_are_those_of_a_plain_model(
    of: str,
    fraction: float | None,
    folder: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(losses_module, "_LOGITS_NBYTES", 4 * 300 * 50)  # two rows or so at once
    store = request.getfixturevalue("store" if of == "concat" else of)
    sae = PlainSae(D, 96)
    is_read = taken(store)
    is_read[:, 0] = False
    is_counted = is_read
    if fraction is not None:
        drawn = ByDocument(fraction, 2).of(np.asarray(store.documents[:]))
        is_counted = is_read & drawn
        assert 0 < is_counted.sum() < is_read.sum()
    expected = by_hand(folder, store, sae, is_read, is_counted)
    n_sequences = len(store.lengths)
    evaluation = analysis.evaluate_sae(
        store,
        HOOK,
        {"plain": sae, "topk": sae_of("topk", D, 96)},
        held_out=fraction,
        seed=2,
        seqpos=slice(1, None),
        model=str(folder),
        n_sequences=n_sequences,
    )
    found = evaluation["plain"].losses
    assert found is not None
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=1e-4)
    # Of the sequences that have a loss; those with a single token have none.
    assert found.l0 == pytest.approx(evaluation["plain"].l0, rel=0.02)
    other = evaluation["topk"].losses
    assert other is not None
    assert other.loss == found.loss
    assert other.loss_with_sae != found.loss_with_sae


def test_sequences_are_drawn_with_the_seed(folder: Path, store: Store) -> None:
    model = HookedModel.from_pretrained(folder, dtype="float32", device="cpu")
    options: dict[str, Any] = {"model": model, "n_sequences": 7, "sequences": slice(10, 40)}
    told: list[Any] = []
    sae: Any = PlainSae(D, 96)
    one = analysis.evaluate_sae(store, HOOK, sae, **options, on_loss_progress=told.append)[0].losses
    again = analysis.evaluate_sae(store, HOOK, sae, **options)[0].losses
    other = analysis.evaluate_sae(store, HOOK, sae, **options, seed=1)[0].losses
    assert one is not None
    assert other is not None
    assert one == again
    assert one.n_tokens == other.n_tokens == 7 * 23
    assert one.loss != other.loss
    assert told[-1].n_tokens == told[-1].n_tokens_in_all == 7 * 24
    assert told[-1].seconds_left == 0
    assert told[-1].tokens_per_second > 0
    # The drawn ones, in the order of the store, are all that count.
    numbers = np.sort(np.random.default_rng(0).permutation(np.arange(10, 40))[:7])
    tokens = torch.from_numpy(np.asarray(store.tokens[numbers.tolist()]).astype(np.int64))
    sae.cfg = SimpleNamespace(hook_name=HOOK)
    assert patching.loss_recovered(model, tokens, sae, exclude=()) == one


def test_heads_are_read_side_by_side(folder: Path, store: Store) -> None:
    exact = SimpleNamespace(encode=lambda x: x, decode=lambda x: x)
    figures = analysis.evaluate_sae(store, HEADS, exact, model=str(folder), n_sequences=5)[0]
    assert figures.explained_variance == pytest.approx(1)
    assert figures.losses is not None
    assert figures.losses.kl_with_sae == pytest.approx(0, abs=1e-6)
    assert figures.losses.recovered == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("kind", ["vocabulary", "width", "weights"])
def test_another_model_than_that_of_the_store_is_refused(
    kind: str, store: Store, tiny_model: TinyModel
) -> None:
    config: dict[str, Any] = {"vocabulary": {"vocab_size": 40}, "width": {"hidden_size": 32}}.get(kind, {})
    model = HookedModel.from_pretrained(tiny_model("llama", **config), dtype="float32", device="cpu")
    if kind == "weights":
        torch.manual_seed(1)
        for weight in model.hf.parameters():
            weight.data.copy_(torch.randn(weight.shape) / 10)
    with pytest.raises(JobError, match="the model does not give what .* has of blocks.1.hook_resid_post"):
        analysis.evaluate_sae(store, HOOK, PlainSae(D, 96), model=model)


def test_rows_without_a_loss(folder: Path, store: Store) -> None:
    sae = PlainSae(D, 96)
    with pytest.raises(JobError, match="followed by another token"):
        analysis.evaluate_sae(store, HOOK, sae, model=str(folder), seqpos=[23])
    with pytest.raises(JobError, match="n_sequences is 0"):
        analysis.evaluate_sae(store, HOOK, sae, model=str(folder), n_sequences=0)
