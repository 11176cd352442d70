"""The special tokens that packing inserts, each checked to be in the tokenizer and in the embedding of the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from actstore.errors import TokensError
from actstore.extraction.planning.job import Job
from actstore.tokens import special_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens; None where packing inserts none."""

    begin_batch: int | None
    begin_sequence: int | None
    separator: int | None
    pad: int | None


def needs_tokenizer(job: Job, *, is_text: bool, is_file: bool = True) -> bool:
    """Whether the text, or a token that the job names, needs a tokenizer.

    Args:
        job: the job.
        is_text: whether the source holds text, not ids.
        is_file: whether it is read from files. Ids in memory are padded with any id if the job names none.
    """
    chosen = _chosen(job, "bos" if is_text else "none")
    pads = job.packing == "document" and not isinstance(job.pad_token, int)
    if not is_file and job.pad_token is None:
        pads = False
    return is_text or pads or any(isinstance(token, str) and token != "none" for token in chosen.values())


def special_tokens(
    job: Job,
    tokenizer: "PreTrainedTokenizerBase | None",
    *,
    default: Literal["bos", "none"],
    n_embeddings: int,
    is_file: bool = True,
) -> SpecialTokens:
    """The ids that a job names, or leaves to the defaults.

    Args:
        job: the job.
        tokenizer: the tokenizer; None where none is needed.
        default: the token that a sequence begins with, and that separates documents, if the job names none.
        n_embeddings: rows of the model's embedding.
        is_file: whether documents are read from files. Prompts in memory are padded with any id, if need be.

    Raises:
        TokensError: the tokenizer lacks a token, or the model has no embedding for it.
    """

    separator = "sequence_separator_token"

    def id_of(option: str, token: int | str | None) -> int | None:
        if token is None or token == "none":
            return None
        if isinstance(token, str) or tokenizer is not None:
            assert tokenizer is not None  # `needs_tokenizer` ensures it
            token_id = special_id(tokenizer, token, option=option)
        else:
            token_id = token
        assert token_id is not None
        if job.packing == "concat" or option != separator:  # a row of one document has no separator
            _check_embedding(option, token, token_id, job, tokenizer, n_embeddings)
        return token_id

    chosen = _chosen(job, default)
    if job.packing == "document" and job.sequence_separator_token is None and _lacks_bos(tokenizer):
        chosen[separator] = None  # no row has two documents, so no separator is needed
    return SpecialTokens(
        id_of("begin_batch_token", chosen["begin_batch_token"]),
        id_of("begin_sequence_token", chosen["begin_sequence_token"]),
        id_of(separator, chosen[separator]),
        id_of("pad_token", _pad(job, tokenizer, is_file=is_file)) if job.packing == "document" else None,
    )


def _chosen(job: Job, default: str) -> dict[str, int | str | None]:
    begin, separator = job.begin_batch_token, job.sequence_separator_token
    return {
        "begin_batch_token": default if begin is None else begin,
        "begin_sequence_token": job.begin_sequence_token,
        "sequence_separator_token": default if separator is None else separator,
    }


def _lacks_bos(tokenizer: "PreTrainedTokenizerBase | None") -> bool:
    return tokenizer is not None and tokenizer.bos_token_id is None


def _pad(job: Job, tokenizer: "PreTrainedTokenizerBase | None", *, is_file: bool) -> int | str:
    if job.pad_token is not None:
        return job.pad_token
    assert tokenizer is not None or not is_file
    for name in ("pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id", None) is not None:
            return name
    if tokenizer is None or not is_file:
        return 0
    raise TokensError(
        f"packing: document fills sequences with a token, and the tokenizer {tokenizer.name_or_path} has neither a PAD "
        "nor an EOS token; name one with pad_token (--pad-token): any token id will do, such as 0, as what is computed "
        "at padding is never looked at"
    )


def _check_embedding(
    option: str,
    token: int | str,
    token_id: int,
    job: Job,
    tokenizer: "PreTrainedTokenizerBase | None",
    n_embeddings: int,
) -> None:
    if token_id < n_embeddings:
        return
    if tokenizer is None or isinstance(token, int):
        what = f"{option} is {token_id}"
    else:
        what = f"the {token.upper()} token of the tokenizer {tokenizer.name_or_path} has the id {token_id}"
    advice = "" if option == "pad_token" else ", or 'none' for no token"
    raise TokensError(
        f"{what}, and the model {job.model} has embeddings for the ids 0 to {n_embeddings - 1} only; name another "
        f"token with {option} (--{option.replace('_', '-')}){advice}, or give the model that embedding and save it "
        "(model.resize_token_embeddings(len(tokenizer)), model.save_pretrained(folder))"
    )
