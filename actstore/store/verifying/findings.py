"""The result of checking a store."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One problem of a store."""

    key: str
    """The object with the problem, as a key below the root of the store."""
    problem: str
    run: str | None = None
    segment: int | None = None
    severity: Literal["damage", "warning"] = "damage"
    """A warning is about values that the model computed, such as NaN; the bytes are as they were written."""
    is_repairable: bool = True
    """Whether a repair can remove the object or write it again."""

    def __str__(self) -> str:
        return f"{self.severity}: {self.key} {self.problem}"


@dataclass(frozen=True)
class Verification:
    """The result of `actstore.verify`."""

    url: str
    is_complete: bool
    """Whether everything that was planned is committed."""
    incomplete: tuple[str, ...]
    """The runs that are not complete: name, hooks, tokens, segments."""
    n_segments: int
    n_committed: int
    n_objects: int
    """Number of objects that were read and checked."""
    nbytes: int
    """Bytes of these objects together."""
    n_rows_recomputed: int
    """Number of sequences that were computed again and compared; 0 unless requested."""
    reference: Literal["whole", "loaded"] | None
    """The model of that comparison: ``whole`` as transformers loads it, or ``loaded`` with only the layers that the
    hooks need, for lack of memory.
    """
    findings: tuple[Finding, ...]
    n_removed: int
    """Objects that a repair has removed."""
    n_rewritten: int
    """Objects that a repair has written again from other objects of the store."""
    seconds: float

    @property
    def damage(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "damage")

    @property
    def is_clean(self) -> bool:
        """Whether everything that is committed is as it was written."""
        return not self.damage

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self) | {"is_clean": self.is_clean}
