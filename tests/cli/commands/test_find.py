"""``actstore find``: the places of a text, with the text around them."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import actstore
from actstore.cli.main import cli


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs that hold a word at known places."""
    from actstore.demo import MODEL_PATH

    out = tmp_path_factory.mktemp("find") / "store"
    texts = ["my lord, my lord", "no such thing", "Good my lord"]
    actstore.extract(model=str(MODEL_PATH), tokens=texts, hooks="blocks.0.hook_resid_post", out=str(out))
    return out


def find(store: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, ["find", str(store), *arguments])


def places(store: Path, text: str) -> list[tuple[int, int]]:
    """Sequences and positions where the tokens behind a position spell a text."""
    opened = actstore.open(str(store))
    found = []
    for sequence in range(opened.shape[0]):
        tokens = opened.str_tokens(sequence)
        found += [(sequence, i) for i in range(len(tokens)) if "".join(tokens[i:]).startswith(text)]
    return found


def test_places_with_their_text(store: Path) -> None:
    done = find(store, " lord", "--window", "1")
    assert done.exit_code == 0, done.output
    expected = places(store, " lord")
    assert len(expected) == 3
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"{sequence}:{position}" for sequence, position in expected
    ]
    assert all("my[[ lord]]" in line for line in lines)
    assert done.stderr.strip() == "3 places"


def test_json_and_limit(store: Path) -> None:
    document = json.loads(find(store, " lord", "--limit", "1", "--json").stdout)
    assert [(one["sequence"], one["position"]) for one in document["places"]] == places(store, " lord")[:1]
    assert document["may_be_more"]
    assert json.loads(find(store, "zebra", "--json").stdout) == {"places": [], "may_be_more": False}


def test_tokens_in_the_place_of_a_text(store: Path) -> None:
    token = actstore.open(str(store)).tokens[0, 1]
    done = find(store, "--tokens", str(token))
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0].startswith("0:1 ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a TEXT to look for, or --tokens"),
        (["lord", "--tokens", "1"], "give a TEXT to look for, or --tokens"),
        (["--tokens", "1,a"], "'1,a' is no list of token ids"),
    ],
)
def test_wrong_usage(store: Path, arguments: list[str], message: str) -> None:
    done = find(store, *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
