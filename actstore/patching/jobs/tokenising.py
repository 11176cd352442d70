"""Making token ids of pairs as users give them, and checking every pair before there is work to lose."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from actstore.errors import PatchError, TokensError
from actstore.hooks.text.prompts import Prompts
from actstore.patching.jobs.pairs import NO_TOKEN, Pairs

_SHOWN: Final = 10
"""Places of wrong pairs that a message names."""


@dataclass(frozen=True)
class PairRules:
    """What every pair must be like."""

    prompts: Prompts | str
    """The tokenizer; or the reason why there is none."""
    prepend_bos: bool | None
    d_vocab: int
    n_ctx: int | None
    """Most tokens of a prompt."""
    positions: tuple[int, ...]
    """Positions that the metric looks at."""
    has_wrong: bool
    """Whether the metric needs a wrong answer."""


def tokenised(read: Sequence[tuple[str, dict[str, Any]]], rules: PairRules) -> Pairs:
    """Token ids of pairs.

    Args:
        read: (place of a pair, its columns).
        rules: see there.

    Raises:
        PatchError: a pair cannot be patched; the message says what is wrong with the first, and names others.
    """
    made = []
    problems: list[tuple[str, str]] = []
    for where, record in read:
        try:
            made.append(_Checked.of(record, rules))
        except (PatchError, TokensError) as error:
            problems.append((where, str(error)))
    if problems:
        (where, problem), *others = problems
        more = ""
        if others:
            # "line 4" is enough where the file is that of the first.
            file = where.partition(" of ")[2]
            named = [place.removesuffix(f" of {file}") for place, _ in others[:_SHOWN]]
            rest = len(others) - len(named)
            more = f"; {len(problems)} of {len(read)} pairs are wrong, also {', '.join(named)}" + (
                f" and {rest} more" if rest else ""
            )
        raise PatchError(f"{where}: {problem}{more}")
    return Pairs(
        clean=np.array([token for pair in made for token in pair.clean], np.int32),
        corrupted=np.array([token for pair in made for token in pair.corrupted], np.int32),
        ends=np.cumsum([len(pair.clean) for pair in made], dtype=np.int64),
        answers=np.array([pair.answer for pair in made], np.int32),
        wrong=np.array([pair.wrong for pair in made], np.int32),
    )


@dataclass(frozen=True)
class _Checked:
    """A pair that can be patched."""

    clean: list[int]
    corrupted: list[int]
    answer: int
    wrong: int

    @classmethod
    def of(cls, record: dict[str, Any], rules: PairRules) -> "_Checked":
        """Check a pair.

        Raises:
            PatchError, TokensError: it cannot be patched.
        """
        clean, corrupted = (_ids(record, column, rules) for column in ("clean", "corrupted"))
        if len(clean) != len(corrupted):
            raise PatchError(
                f"clean has {len(clean)} tokens and corrupted has {len(corrupted)}; choose prompts with as many "
                "tokens, so that positions mean the same"
            )
        if clean == corrupted:
            raise PatchError(
                "clean and corrupted are the same tokens, so there is nothing to patch; leave it out"
            )
        if rules.n_ctx is not None and len(clean) > rules.n_ctx:
            raise PatchError(
                f"the prompts have {len(clean)} tokens, and the model is made for {rules.n_ctx}; shorten them"
            )
        outside = [position for position in rules.positions if not -len(clean) <= position < len(clean)]
        if outside:
            raise PatchError(
                f"positions holds {outside[0]}, and the prompts have {len(clean)} tokens; choose a position that all "
                "pairs have, or leave this one out"
            )
        answer = _answer(record, "answer", rules)
        wrong = _answer(record, "wrong", rules) if rules.has_wrong else NO_TOKEN
        if answer == wrong:
            raise PatchError(f"answer and wrong are the same token {answer}; give two answers that differ")
        return cls(clean, corrupted, answer, wrong)


def _ids(record: dict[str, Any], column: str, rules: PairRules) -> list[int]:
    """The token ids of a prompt, which is text or ids."""
    given = _given(record, column)
    if isinstance(given, str):
        ids: list[int] = (
            _tokenizer(column, rules).to_tokens(given, prepend_bos=rules.prepend_bos)[0][0].tolist()
        )
        return ids
    if isinstance(given, list) and given:
        return [_id(token, column, rules) for token in given]
    raise PatchError(f"{column} is {_quoted(given)}; give text, or a list of token ids")


def _answer(record: dict[str, Any], column: str, rules: PairRules) -> int:
    """The id of an answer, which is the text of one token, or its id."""
    given = _given(record, column)
    if isinstance(given, str):
        try:
            return _tokenizer(column, rules).to_single_token(given)
        except TokensError as error:
            raise PatchError(f"{column}: {error}") from error
    if isinstance(given, list) and len(given) == 1:
        (given,) = given
    return _id(given, column, rules)


def _given(record: dict[str, Any], column: str) -> Any:
    if record.get(column) is None:
        names = ", ".join(name for name, value in record.items() if value is not None) or "nothing"
        other = ", or choose a metric of answer alone, such as logit" if column == "wrong" else ""
        raise PatchError(f"{column} is missing, there is {names}; give it{other}")
    return record[column]


def _tokenizer(column: str, rules: PairRules) -> Prompts:
    if isinstance(rules.prompts, str):
        raise PatchError(
            f"{column} is text, and the model has no tokenizer ({rules.prompts}); give lists of token ids"
        )
    return rules.prompts


def _id(token: Any, column: str, rules: PairRules) -> int:
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < rules.d_vocab:
        raise PatchError(
            f"{column} holds {_quoted(token)}, which is no token id of this model; ids are 0 to {rules.d_vocab - 1}"
        )
    return token


def _quoted(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}..."
