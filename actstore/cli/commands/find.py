"""``actstore find``: where a text, or token ids, are in a store."""

from typing import Any

import click

from actstore.cli.showing.json_document import print_json
from actstore.counted import counted
from actstore.errors import TokensError
from actstore.facade import Store
from actstore.opening import open_store


@click.command("find")
@click.argument("url")
@click.argument("text", required=False)
@click.option("--tokens", metavar="ID[,ID]", help="Token ids that follow each other, in the place of TEXT.")
@click.option(
    "--prefix", is_flag=True, help="Only where a sequence begins; tokens that packing put in may precede."
)
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="The most places.")
@click.option(
    "--window", type=click.IntRange(0), default=10, show_default=True, help="Tokens shown on each side."
)
@click.option("--json", "as_json", is_flag=True, help="Print the places as JSON.")
def find_command(
    url: str, text: str | None, tokens: str | None, prefix: bool, limit: int, window: int, as_json: bool
) -> None:
    """Print where TEXT is in the store at URL: sequence, position, and the text around it.

    The store can be on a server, too. The first token of each place is in double brackets.

    \b
    actstore find runs/a "my lord" --limit 5
    """
    if (text is None) == (tokens is None):
        raise click.UsageError("give a TEXT to look for, or --tokens, and not both")
    ids = None if tokens is None else _ids(tokens)
    store = open_store(url)
    matches = store.locate(text, tokens=ids, prefix=prefix, limit=limit)
    places = list(zip(matches.sequences.tolist(), matches.positions.tolist(), strict=True))
    shown = [{"sequence": s, "position": p, "text": _around(store, s, p, window)} for s, p in places]
    if as_json:
        print_json({"places": shown, "may_be_more": len(places) == limit})
        return
    for place in shown:
        where = f"{place['sequence']}:{place['position']}"
        click.echo(f"{where:<12} {place['text'] or ''}".rstrip())
    more = "; there may be more, see --limit" if len(places) == limit else ""
    click.echo(f"{counted(len(places), 'place')}{more}", err=True)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no list of token ids, such as 12,345", param_hint="--tokens"
        ) from error


def _around(store: Store, sequence: int, position: int, window: int) -> str | None:
    """The text around a position on one line; None if the tokenizer of the store is not there."""
    try:
        tokens: list[Any] = store.str_tokens(sequence)
    except TokensError:
        return None
    before = "".join(tokens[max(0, position - window) : position])
    after = "".join(tokens[position + 1 : position + 1 + window])
    return f"{before}[[{tokens[position]}]]{after}".replace("\n", "↵")
