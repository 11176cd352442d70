"""What `help` and editors show of the options of a loader."""

import inspect
from pathlib import Path

import pytest

from actstore.facade import Store
from actstore.loader.arguments import OPTIONS
from actstore.query.server.routes.parameters import BatchQuery
from actstore.storage.local import LocalBlobs
from tests.loader.stores import finished
from tests.store.example import HOOKS, example_plan


def test_the_signature_has_every_option_with_its_default() -> None:
    parameters = inspect.signature(Store.loader).parameters
    assert list(parameters) == ["self", "hooks", *OPTIONS]
    for name, option in OPTIONS.items():
        parameter = parameters[name]
        assert parameter.kind is parameter.KEYWORD_ONLY
        assert parameter.default == (parameter.empty if name == "batch_size" else option.default)


def test_the_docstring_has_every_option_with_its_meaning() -> None:
    words = " ".join((Store.loader.__doc__ or "").split())
    for name, option in OPTIONS.items():
        assert f" {name}: {option.meaning} " in words


def test_an_unknown_option_and_a_missing_one_are_named(tmp_path: Path) -> None:
    store, _ = finished(LocalBlobs(tmp_path / "store"), example_plan("float32"))
    with pytest.raises(TypeError, match="'batchsize'"):
        store.loader(HOOKS[0], batchsize=8)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="'batch_size'"):
        store.loader(HOOKS[0])  # type: ignore[call-arg]


def test_a_server_takes_all_options_but_those_of_the_client_alone() -> None:
    assert OPTIONS.keys() - BatchQuery.model_fields == {
        "mask", "epochs", "prefetch", "cache_dir", "cache_limit", "device",
    }  # fmt: skip
    assert BatchQuery.model_fields.keys() - OPTIONS == {"hook"}
