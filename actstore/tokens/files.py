"""Finding the files of a source: a path or URL, a glob, or a directory, in sorted order and of one format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO, Literal, cast
from urllib.parse import urlsplit

from fsspec.core import url_to_fs

from actstore.errors import MissingExtraError, TokensError
from actstore.reason import reason
from actstore.tokens.compression import decompressed
from actstore.tokens.failure import reading

Format = Literal["text", "jsonl", "parquet", "arrow"]

_FORMATS: Mapping[str, Format] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}
PLACES = "a file, a directory, a glob or hf:org/name"
SUPPORTED = (
    ".txt and .jsonl/.ndjson (also .gz, .zst), .parquet, .arrow, .feather; read others with pandas, and give the table "
    "in Python"
)


@dataclass(frozen=True)
class SourceFile:
    """One file of a source; `nbytes` is its stored (compressed) size, None if the storage does not tell."""

    url: str
    nbytes: int | None
    located: "LocatedFile | None" = field(default=None, compare=False, repr=False)
    """The file itself; None where a source reads no files of its own."""


@dataclass(frozen=True)
class LocatedFile:
    """A file with the filesystem to open it on. `name` is its local path or URL in messages."""

    name: str
    path: str
    nbytes: int | None
    format: Format
    filesystem: Any = field(repr=False)

    def open(self) -> BinaryIO:
        """Open the decompressed bytes. Raises whatever the storage raises: wrap it in `reading`."""
        return decompressed(self.open_stored(), _plain(self.path))

    def open_stored(self) -> BinaryIO:
        """Open the bytes as they are stored. Raises whatever the storage raises: wrap it in `reading`."""
        return cast(BinaryIO, self.filesystem.open(self.path, "rb"))

    @property
    def public(self) -> SourceFile:
        return SourceFile(self.name, self.nbytes, self)


def locate(spec: str, *, supported: str = SUPPORTED, places: str = PLACES) -> tuple[LocatedFile, ...]:
    """The files that `spec` names, at least one, sorted by path, all of one format.

    `supported` and `places` are the suffixes and the kinds of source that errors recommend.

    An existing path is taken literally, even with glob characters in its name. Below a directory, files of other
    formats, hidden files and the `cache-*.arrow` files that `datasets` leaves behind are skipped; a glob must match
    supported files only.

    Raises TokensError if nothing matches, a suffix is not supported, formats are mixed or the listing fails, and
    MissingExtraError if fsspec lacks the package for the URL's protocol.
    """
    filesystem, root = _filesystem(spec)
    try:
        sizes, is_directory = _listing(filesystem, root)
    except PermissionError as error:
        raise TokensError(f"no permission to list {spec}: {reason(error)}") from error
    except Exception as error:  # each storage has its own error classes (botocore's are no OSError)
        raise TokensError(f"{spec} cannot be listed: {reason(error)}") from error
    if is_directory:
        others = sorted(sizes)
        sizes = {path: nbytes for path, nbytes in sizes.items() if _belongs(path)}
        if not sizes:
            holds = f"only others such as {PurePosixPath(others[0]).name}" if others else "no files at all"
            raise TokensError(f"the directory {spec} holds {holds}; supported are {supported}")
    if not sizes:
        raise TokensError(f"nothing is found at {spec}; give {places}{prompt_hint(spec)}")
    files = tuple(_located(filesystem, path, sizes[path], supported) for path in sorted(sizes))
    other = next((file for file in files if file.format != files[0].format), None)
    if other is not None:
        raise TokensError(
            f"{spec} mixes {files[0].format} ({files[0].name}) and {other.format} ({other.name}) files; "
            "give a glob that matches one format"
        )
    return files


def prompt_hint(spec: str) -> str:
    """Advice for text that was given where a path belongs."""
    if not any(character.isspace() for character in spec) and any(sign in spec for sign in "/.:*"):
        return ""
    shown = spec if len(spec) <= 40 else f"{spec[:37]}..."
    return f"; if it is a prompt, give a list in Python: tokens=[{shown!r}]"


def _filesystem(spec: str) -> tuple[Any, str]:
    if not spec.strip():
        raise TokensError(
            "the token source is an empty string; give a file, a directory, a glob or hf:org/name"
        )
    try:
        filesystem, root = url_to_fs(spec)
    except ImportError as error:
        raise MissingExtraError(f"reading {spec} needs a package that is missing: {reason(error)}") from error
    except ValueError as error:
        raise TokensError(f"{spec} is not a path or URL that fsspec knows: {reason(error)}") from error
    return filesystem, str(root)


def _listing(filesystem: Any, root: str) -> tuple[dict[str, int | None], bool]:
    """Sizes by path, and whether `root` is a directory; no paths if nothing is there."""
    try:
        info = filesystem.info(root)
    except FileNotFoundError:
        if not any(character in root for character in "*?["):
            return {}, False
        matches = filesystem.glob(root, detail=True)
        return {
            path: info.get("size") for path, info in matches.items() if info["type"] != "directory"
        }, False
    if info["type"] != "directory":
        return {root: info.get("size")}, False
    filesystem.ls(root, detail=False)  # raises where find would silently skip a folder without permission
    below = filesystem.find(root, detail=True)
    return {path: info.get("size") for path, info in below.items()}, True


def _plain(path: str) -> str:
    """The path without an HTTP query."""
    return urlsplit(path).path if path.startswith(("http://", "https://")) else path


def _format(path: str) -> Format | None:
    suffixes = PurePosixPath(_plain(path).lower()).suffixes
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        file_format = _FORMATS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return file_format if file_format in ("text", "jsonl") else None
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _belongs(path: str) -> bool:
    name = PurePosixPath(path).name
    is_cache = name.startswith("cache-") and name.endswith(".arrow")
    return _format(path) is not None and not name.startswith((".", "_")) and not is_cache


def _located(filesystem: Any, path: str, nbytes: int | None, supported: str) -> LocatedFile:
    local = "file" in (
        filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,)
    )
    name = path if local else str(filesystem.unstrip_protocol(path))
    file_format = _format(path)
    if file_format is None:
        raise TokensError(f"{name} has a suffix that is not supported; supported are {supported}")
    return LocatedFile(name, path, nbytes, file_format, filesystem)


def probe(file: LocatedFile) -> None:
    """Raise TokensError if the first byte of `file` cannot be read."""
    with reading(file.name), file.open() as stream:
        stream.read(1)
