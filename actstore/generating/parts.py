"""The file of generated text, and the parts that it is made of.

A part is one batch. It is written beside, and renamed, so it is whole or not there. When all parts are there, they are
joined in the same way.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from actstore.errors import PlanMismatchError, StorageError
from actstore.reason import reason

if TYPE_CHECKING:
    import pyarrow as pa

_PLAN: Final = ".plan.json"


class Parts:
    """The parts of one file."""

    def __init__(self, out: str, plan: dict[str, Any], n_parts: int) -> None:
        """Begin the file, or go on with it.

        Args:
            out: path of the file, .jsonl or .parquet.
            plan: all that decides what is in it, as plain data.
            n_parts: the number of parts.

        Raises:
            PlanMismatchError: the file is of another plan; the differences are named.
            StorageError: the file is there and nothing says what it is, or its folder cannot be written.
        """
        self.out = Path(out)
        self.n_parts = n_parts
        self._folder = Path(f"{out}.parts")
        note = Path(f"{out}{_PLAN}")
        try:
            stored = json.loads(note.read_bytes()) if note.exists() else None
            if stored is None:
                if self.out.exists():
                    raise StorageError(f"{out} is there already, and was not generated; choose another out")
                self.out.parent.mkdir(parents=True, exist_ok=True)
                _write(note, json.dumps(plan, indent=2).encode() + b"\n")
        except (OSError, ValueError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"{note} cannot be read or written: {reason(error)}") from error
        if stored is not None and stored != plan:
            lines = [
                f"{name} is {json.dumps(stored.get(name))} there, {json.dumps(plan.get(name))} was asked for"
                for name in sorted({*stored, *plan})
                if stored.get(name) != plan.get(name)
            ]
            raise PlanMismatchError(
                f"{out} was begun by another job: {'; '.join(lines)}. Choose another out, or delete it and {note.name}"
            )

    @property
    def is_finished(self) -> bool:
        return self.out.exists()

    @property
    def pending(self) -> list[int]:
        """Numbers of the parts that are still to be made."""
        if self.is_finished:
            return []
        return [part for part in range(self.n_parts) if not self._path(part).exists()]

    def write(self, part: int, rows: Sequence[dict[str, Any]]) -> None:
        """Store a part.

        Raises:
            StorageError: it cannot be written.
        """
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        try:
            self._folder.mkdir(exist_ok=True)
            _write(self._path(part), lines.encode())
        except OSError as error:
            raise StorageError(f"{self._path(part)} cannot be written: {reason(error)}") from error

    def join(self) -> None:
        """Make the file of its parts, and remove them.

        Raises:
            StorageError: it cannot be written.
        """
        partial = Path(f"{self.out}.partial")
        try:
            if not self.is_finished:
                if self.out.suffix == ".jsonl":
                    self._join_lines(partial)
                else:
                    self._join_tables(partial)
                _rename(partial, self.out)
            shutil.rmtree(self._folder, ignore_errors=True)
        except OSError as error:
            raise StorageError(f"{self.out} cannot be written: {reason(error)}") from error

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:08}.jsonl"

    def _join_lines(self, partial: Path) -> None:
        with partial.open("wb") as file:
            for part in range(self.n_parts):
                with self._path(part).open("rb") as source:
                    shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())

    def _join_tables(self, partial: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            # A field that is null in one part can be a number in another, and tools take many arguments.
            schema = pa.unify_schemas(
                [table.schema for table in self._tables()], promote_options="permissive"
            )
            with pq.ParquetWriter(partial, schema) as writer:
                for part in range(self.n_parts):
                    writer.write_table(pa.Table.from_pylist(self._rows(part), schema))
        except pa.ArrowException as error:
            raise StorageError(
                f"the messages of {self.out} have no common type, which Parquet needs: {reason(error)}; rename it to "
                ".jsonl in the job, and the parts that are there are kept"
            ) from error
        with partial.open("rb") as file:
            os.fsync(file.fileno())

    def _tables(self) -> "Iterator[pa.Table]":
        import pyarrow as pa

        return (pa.Table.from_pylist(self._rows(part)) for part in range(self.n_parts))

    def _rows(self, part: int) -> list[dict[str, Any]]:
        # Not splitlines, which also splits at characters that JSON leaves as they are.
        return [json.loads(line) for line in self._path(part).read_bytes().split(b"\n") if line]


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    _rename(partial, path)


def _rename(partial: Path, path: Path) -> None:
    partial.replace(path)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # or a power cut could take the name away again
        finally:
            os.close(folder)
