"""What a command gives: JSON instead of text, and files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from actstore.errors import ActstoreError
from actstore.storage.urls import local_path


class NewFile(click.ParamType[Path]):
    """A file to write. That it can be written is seen before any work."""

    def __init__(self, *suffixes: str) -> None:
        self.name = "file"
        self._suffixes = suffixes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        try:
            file = local_path(Path(value), "the file")
        except ActstoreError as error:
            return self.fail(str(error), param, ctx)
        if file.suffix not in self._suffixes:
            return self.fail(f"{file} must end with {' or '.join(self._suffixes)}", param, ctx)
        if not file.absolute().parent.is_dir():
            return self.fail(f"there is no folder {file.absolute().parent}; make it first", param, ctx)
        return file


def out_option(what: str, *suffixes: str) -> Callable[[Any], Any]:
    """``--out``, for what goes into a file: Parquet unless there are other suffixes."""
    return _file_option("--out", f"Write {what} to this file.", suffixes or (".parquet",))


def plot_option(what: str) -> Callable[[Any], Any]:
    """``--plot``, for a picture."""
    return _file_option("--plot", f"Draw {what} into this file.", (".png",))


def _file_option(flag: str, meaning: str, suffixes: tuple[str, ...]) -> Callable[[Any], Any]:
    metavar = "FILE" + "|".join(suffixes)
    return click.option(flag, type=NewFile(*suffixes), metavar=metavar, help=meaning)


json_option: Final = click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
