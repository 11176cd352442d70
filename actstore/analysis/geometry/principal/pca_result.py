"""Principal components of hooks as users have them: with files and pictures."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from actstore.analysis.geometry.principal.components import Components
from actstore.analysis.geometry.principal.pca_file import read_safetensors, write_parquet, write_safetensors
from actstore.analysis.geometry.principal.pca_picture import draw
from actstore.analysis.geometry.principal.sampled_rows import sampled_rows
from actstore.analysis.geometry.showing.tables import table_html
from actstore.analysis.scanning.chosen_rows import ChosenRows
from actstore.errors import JobError

if TYPE_CHECKING:
    from actstore.store.committed_store import CommittedStore

_SHOWN: Final = 8
"""Components that a table shows."""


class PCA(Components):
    """Principal components of the rows of a hook. Get them from `actstore.analysis.pca`."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this as safetensors, or as a table of the components if the name ends with ``.parquet``.

        Raises:
            JobError: the name has another suffix.
        """
        PCAs({self.hook: self}).save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote as safetensors.

        Raises:
            JobError: the file is none of these, or has several hooks.
        """
        loaded = PCAs.load(path)
        if len(loaded) != 1:
            raise JobError(f"{path} has components of {len(loaded)} hooks; read it with PCAs.load")
        (only,) = loaded.values()
        assert isinstance(only, cls)
        return only

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw the explained variance, and write it as PNG if there is a path; returns the figure of matplotlib.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        return PCAs({self.hook: self}).plot(path)

    def scatter(
        self,
        store: "CommittedStore",
        path: str | os.PathLike[str] | None = None,
        *,
        color: str = "position",
        n_rows: int = 4096,
        seed: int = 0,
        drop: Any = (),
        seqpos: Any = None,
        sequences: Any = None,
    ) -> Any:
        """Draw rows of a store along the first two components, beside the explained variance.

        Args:
            store: the store whose rows are drawn.
            path: PNG file to write; None for none.
            color: ``position``, or a kept column of the store.
            n_rows: rows that are drawn, at random.
            seed: decides which.
            drop, seqpos, sequences: the rows to draw from, as for `scan`.

        Returns:
            The figure of matplotlib.

        Raises:
            JobError: there are fewer than two components, or no rows.
            MissingExtraError: matplotlib is not installed.
            TokensError: the store does not keep the column.
        """
        every = PCAs({self.hook: self})
        return every.scatter(
            store, path, color=color, n_rows=n_rows, seed=seed, drop=drop, seqpos=seqpos, sequences=sequences
        )

    def __repr__(self) -> str:
        share = float(self.explained_variance_ratio.sum())
        return (
            f"<PCA {self.hook}: {self.n_components} components of {self.count:,} rows of {len(self.mean)}, "
            f"{share:.1%} of the variance>"
        )

    def _repr_html_(self) -> str:
        return PCAs({self.hook: self})._repr_html_()


class PCAs(Mapping[str, PCA]):
    """Principal components of several hooks, by name of the hook."""

    def __init__(self, pca_by_hook: Mapping[str, PCA]) -> None:
        self._by_hook = dict(pca_by_hook)

    def __getitem__(self, hook: str) -> PCA:
        return self._by_hook[hook]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_hook)

    def __len__(self) -> int:
        return len(self._by_hook)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write these as safetensors, or as a table of the components if the name ends with ``.parquet``.

        Raises:
            JobError: the name has another suffix.
        """
        file = Path(path)
        if file.suffix == ".safetensors":
            write_safetensors(file, list(self.values()))
        elif file.suffix == ".parquet":
            write_parquet(file, list(self.values()))
        else:
            raise JobError(
                f"{file.name} ends with {file.suffix or 'no suffix'!r}; choose .safetensors or .parquet"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote as safetensors.

        Raises:
            JobError: the file is none of these.
        """
        return cls({fields["hook"]: PCA(**fields) for fields in read_safetensors(Path(path))})

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """See `PCA.plot`."""
        return draw(list(self.values()), None, None if path is None else Path(path))

    def scatter(
        self,
        store: "CommittedStore",
        path: str | os.PathLike[str] | None = None,
        *,
        color: str = "position",
        n_rows: int = 4096,
        seed: int = 0,
        drop: Any = (),
        seqpos: Any = None,
        sequences: Any = None,
    ) -> Any:
        """See `PCA.scatter`."""
        for one in self.values():
            if one.n_components < 2:
                raise JobError(
                    f"{one.hook} has 1 component, and a picture of rows needs 2; compute more of them"
                )
        sample = sampled_rows(store, ChosenRows.of(store, drop, seqpos, sequences), color, n_rows, seed)
        return draw(list(self.values()), sample, None if path is None else Path(path))

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values())) or "<PCAs of no hooks>"

    def _repr_html_(self) -> str:
        head = ["hook", "rows", "size", "variance", "in all", *(f"{i}" for i in range(_SHOWN))]
        lines = []
        for one in self.values():
            shares = one.explained_variance_ratio
            cells = [one.hook, f"{one.count:,}", f"{len(one.mean):,}", f"{one.total_variance:.4g}"]
            cells += [f"{float(shares.sum()):.1%}", *(f"{share:.1%}" for share in shares[:_SHOWN])]
            lines.append(cells + [""] * (len(head) - len(cells)))
        return table_html("Principal components, and their shares of the variance", head, lines)
