"""Tables of the pages say what the tables of the code say."""

import re
from pathlib import Path
from typing import Final

import click

from actstore.cli.commands.serve import serve_command
from actstore.cli.options.byte_size import byte_size
from actstore.extraction.planning.job import Job
from actstore.hooks.naming.hook_points import POINTS
from actstore.loader.arguments import OPTIONS
from actstore.patching.jobs.job import PatchJob

ROOT: Final = Path(__file__).parents[2]


def table(page: str, head: str) -> list[list[str]]:
    """The cells of each row of the table of a page that has this head."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    assert head in lines, head
    next(lines)  # the line below the head
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_options_of_a_loader() -> None:
    assert table("docs/loader.md", "| option | default | |") == [
        [f"`{name}`", "" if option.default is ... else f"`{option.default!r}`", option.meaning]
        for name, option in OPTIONS.items()
    ]


def test_fields_of_a_patching_job() -> None:
    rows = table("docs/patch-jobs.md", "| field | default | |")
    for (name, default, meaning), (field_name, field) in zip(
        rows, PatchJob.model_fields.items(), strict=True
    ):
        value = ",".join(field.default) if isinstance(field.default, tuple) else field.default
        assert name == f"`{field_name}`"
        assert default == ("" if field.is_required() or value is None else f"`{value}`")
        assert meaning == field.description


def test_tokens_that_packing_puts_in() -> None:
    rows = table("docs/tokens.md", "| option | token | default for text | default for ids |")
    fields = {name: field for name, field in Job.model_fields.items() if name.endswith("_token")}
    for (option, _, for_text, for_ids), (name, field) in zip(rows, fields.items(), strict=True):
        assert option == f"`--{name.replace('_', '-')}`"
        default = for_text if for_text == for_ids else f"{for_text} for text, {for_ids} for token ids"
        assert str(field.description).endswith(f" Default: {default.replace('`', '')}.")


SHORT: Final = {"position": "p", "source_position": "source", "one": "1", "expert_choice": "choice"}


def test_hooks() -> None:
    assert table("docs/hooks.md", "| name | shape | value |") == [
        [
            f"`blocks.{{i}}.{point.leaf}`" if point.in_layer else f"`{point.leaf}`",
            " ".join(["b", *(SHORT.get(axis, axis) for axis in point.axes)]),
            point.meaning + (f"; not stored: {point.why_not_stored}" if point.why_not_stored else ""),
        ]
        for point in POINTS
    ]


def test_axes_of_stored_hooks() -> None:
    outside = "without a layer: "
    said = [
        (leaf, not leaves.startswith(outside), tuple(re.findall(r"`(\w+)`", axes)))
        for leaves, axes in table("schemas/format.md", "| leaf | axes at one position |")
        for leaf in re.findall(r"`([\w.]+)`", leaves)
    ]
    assert sorted(said) == sorted(
        (point.leaf, point.in_layer, point.axes_in_store) for point in POINTS if point.why_not_stored is None
    )


def test_default_limits_of_a_server() -> None:
    defaults = {
        option: parameter.get_default(click.Context(serve_command))
        for parameter in serve_command.params
        for option in parameter.opts
    }
    units = {"": 1, "s": 1, "MiB": 1 << 20, "GiB": 1 << 30}
    head = "| protects from | limit | default | beyond it | option |"
    said = [
        (row[4].strip("`"), match)
        for row in table("docs/serve.md", head)
        if row[4] and (match := re.match(r"([\d,]+) ?(MiB|GiB|s)?", row[2]))
    ]
    assert len(said) == 13
    for option, (number, unit) in [(option, match.groups("")) for option, match in said]:
        default = defaults[option]
        nbytes = byte_size()(default) if isinstance(default, str) else default
        assert int(number.replace(",", "")) * units[unit] == nbytes, option
