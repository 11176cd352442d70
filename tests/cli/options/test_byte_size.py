"""Options whose value is a number of bytes."""

import click
import pytest
from click.testing import CliRunner, Result

from actstore.cli.options.byte_size import byte_size


def _run(value: str, minimum: int = 1) -> Result:
    @click.command()
    @click.option("--memory", type=byte_size(minimum))
    def command(memory: int) -> None:
        click.echo(memory)

    return CliRunner().invoke(command, [f"--memory={value}"])


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1073741824", 1 << 30),
        ("1GiB", 1 << 30),
        ("1 gib", 1 << 30),
        ("1.5GB", 1_500_000_000),
        ("2k", 2_000),
    ],
)
def test_sizes_may_have_a_unit(text: str, nbytes: int) -> None:
    assert _run(text).output == f"{nbytes}\n"


@pytest.mark.parametrize("text", ["", "GiB", "-3", "1e400", "nan", "1 parsec", "1GiB2"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    result = _run(text)
    assert result.exit_code == 2
    assert "is not a number of bytes; write one such as 1073741824, 1GiB or 1GB" in result.output


def test_too_few_bytes_are_refused() -> None:
    result = _run("1023", 1024)
    assert result.exit_code == 2
    assert "is too little; the least is 1024 bytes" in result.output
