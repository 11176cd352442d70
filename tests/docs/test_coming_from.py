"""The pages for users of other libraries: their Python, its output, and the claims of their tables."""

import contextlib
import io
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

import pytest
import torch

import actstore
from actstore.demo import MODEL_PATH
from actstore.errors import ModelError
from actstore.extraction.planning.job import Job
from tests.docs.test_hooks_pages import DOCS, FENCED, assert_shown
from tests.parity.bridge import boot

CELL: Final = re.compile(r"`([^`]+)`")


def run_page(page: str) -> dict[str, Any]:
    """Run a page in which each block of text is the output of the Python above it; returns the names it defines."""
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from SAELens itself
        for language, block in FENCED.findall((DOCS / page).read_text(encoding="utf-8")):
            if language == "python":
                with contextlib.redirect_stdout(printed):
                    exec(compile(block, page, "exec"), names)
            else:
                assert_shown(printed.getvalue(), block)
                printed = io.StringIO()
    assert not printed.getvalue()
    return names


def table(page: str, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading, without its head, as cells."""
    text = (DOCS / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = text[text.index("\n|") + 1 :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def evaluated(cell: str, names: dict[str, Any]) -> list[Any]:
    """The value of each expression in a cell."""
    with torch.no_grad():
        return [eval(expression, dict(names)) for expression in CELL.findall(cell)]


def test_from_transformerlens(demo: Path) -> None:
    from transformer_lens import utilities

    here = run_page("from-transformerlens.md")
    bridge = boot(MODEL_PATH)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(here["tokens"])
    there = here | {
        "model": bridge,
        "logits": logits,
        "cache": cache,
        "get_act_name": utilities.get_act_name,
        "utils": utilities,
    }
    rows = table("from-transformerlens.md", "What you type")
    assert len(rows) > 20
    for typed_there, typed_here in rows:
        pairs = zip(evaluated(typed_there, there), evaluated(typed_here, here), strict=True)
        for number, (theirs, ours) in enumerate(pairs):
            assert type(theirs) is type(ours), (typed_there, number)
            if isinstance(ours, torch.Tensor):
                torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4, msg=typed_there)
            else:
                assert ours == theirs, typed_there


def test_what_differs_from_transformerlens() -> None:
    """The differences that the page names exist."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    ours, theirs = actstore.HookedModel.from_pretrained(MODEL_PATH), boot(MODEL_PATH)
    tokens = ours.to_tokens("My lord, I came to see your father's funeral")
    with torch.no_grad():
        _, cache = ours.run_with_cache(tokens)
        _, bridge_cache = theirs.run_with_cache(tokens)
    assert cache["attn_scores", 1].min() == -torch.inf
    assert bridge_cache["attn_scores", 1].isfinite().all()
    assert ours.all_head_labels() == theirs.all_head_labels
    parts = cache.decompose_resid(layer=-1)
    shares = cache.logit_attrs(parts, " lord", " came")
    lord, came = ours.to_single_token(" lord"), ours.to_single_token(" came")
    logits, bias = ours(tokens), ours.folded_b_U[lord] - ours.folded_b_U[came]
    gap = logits[..., lord] - logits[..., came]
    torch.testing.assert_close(shares.sum(0) + bias, gap, atol=1e-3, rtol=1e-3)
    theirs_sum = bridge_cache.logit_attrs(bridge_cache.decompose_resid(layer=-1), " lord", " came").sum(0)
    assert (theirs_sum + bias - gap).abs().max() > 0.1
    with pytest.raises(ModelError, match="weights stay as the model has them"):
        ours.enable_compatibility_mode()
    stream = ours(tokens, stop_at_layer=1)
    torch.testing.assert_close(ours(stream, start_at_layer=1), logits)
    with pytest.raises(NotImplementedError):
        theirs(stream, start_at_layer=1)
    names: Any = {
        "names_filter": ["blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"],
        "return_type": "loss",
    }
    (_, cache), (_, bridge_cache) = (
        model.run_with_cache(tokens, incl_bwd=True, **names) for model in (ours, theirs)
    )
    mid, attn_out = "blocks.1.hook_resid_mid_grad", "blocks.1.hook_attn_out_grad"
    torch.testing.assert_close(cache[mid], cache[attn_out])
    torch.testing.assert_close(cache[attn_out], bridge_cache[attn_out], atol=1e-5, rtol=1e-3)
    assert not torch.allclose(bridge_cache[mid], bridge_cache[attn_out])
    assert theirs.original_model.config._attn_implementation == "eager"
    assert ours.attention != "eager"
    page = (DOCS / "from-transformerlens.md").read_text(encoding="utf-8")
    assert f"| {len(SUPPORTED_ARCHITECTURES)} architectures (Bridge) |" in page


def test_from_saelens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page("from-saelens.md")
    from sae_lens import ActivationsStore, CacheActivationsRunnerConfig

    assert names["sae"].W_dec.isfinite().all()
    store, hook = names["store"], names["hook"]
    assert torch.equal(store["transformer.h.2"][0], store[hook][0])
    options = {field.name for field in fields(CacheActivationsRunnerConfig)}
    for theirs, ours, _ in table("from-saelens.md", "Caching activations"):
        assert set(CELL.findall(theirs)) <= options
        assert set(CELL.findall(ours)) <= set(Job.model_fields)
    for theirs, *_ in table("from-saelens.md", "Training"):
        for name in CELL.findall(theirs):
            attribute = re.sub(r"^store\.|[(=].*$", "", name)
            assert (
                hasattr(ActivationsStore, attribute)
                or attribute in ActivationsStore.__init__.__code__.co_varnames
            )
