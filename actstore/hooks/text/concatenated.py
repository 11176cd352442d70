"""Rows of equal length from a dataset of texts, for a notebook: ``tokenize_and_concatenate`` of TransformerLens.

`actstore.plan` does the same for whole corpora, one text at a time, and keeps where each token came from.
"""

from typing import Any

from actstore.errors import TokensError


def tokenize_and_concatenate(
    dataset: Any,
    tokenizer: Any,
    streaming: bool = False,
    max_length: int = 1024,
    column_name: str = "text",
    add_bos_token: bool = True,
    num_proc: int | None = None,
    set_format: bool = True,
) -> Any:
    """Texts of a dataset of Hugging Face, joined with EOS between them, in rows of ids: a dataset of ``tokens``.

    Texts are joined a thousand at a time, and what is left of a thousand that fills no row is dropped; fewer tokens
    than one row are padded. The tokenizer is not changed.

    Args:
        dataset: a dataset, or an iterable one.
        tokenizer: a tokenizer of Hugging Face.
        streaming: say True for an iterable dataset.
        max_length: tokens in a row.
        column_name: the column with texts.
        add_bos_token: begin each row with BOS.
        num_proc: processes that tokenise; None for this one. Each joins its own part of the texts.
        set_format: give tensors; say False for an iterable dataset.

    Raises:
        TokensError: the tokenizer has no EOS or no BOS token, and it is needed.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    if eos is None or (add_bos_token and bos is None):
        raise TokensError(
            "this tokenizer lacks the EOS token that comes between texts, or the BOS token; use actstore.plan, which "
            "needs neither"
        )
    begin = [bos] if add_bos_token else []
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    length = max_length - len(begin)

    def rows_of(examples: Any) -> dict[str, list[list[int]]]:
        ids: list[int] = []
        texts = examples[column_name]
        for index, row in (
            enumerate(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]) if texts else ()
        ):
            ids += [*([eos] if index else []), *row]
        if not ids:
            return {"tokens": []}
        ids += [pad] * (length - len(ids))
        whole = len(ids) - len(ids) % length
        return {"tokens": [begin + ids[start : start + length] for start in range(0, whole, length)]}

    others = [name for name in dataset.features or () if name != column_name]
    options = {} if streaming else {"num_proc": num_proc}
    tokenized = dataset.map(rows_of, batched=True, remove_columns=[*others, column_name], **options)
    if set_format:
        tokenized.set_format(type="torch", columns=["tokens"])
    return tokenized
