"""The job of ``actstore dashboard``: what a user asks for, in a YAML file or as options."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

from actstore.errors import JobError
from actstore.extraction.planning.execution_fields import Executor, NumWorkers, RayAddress
from actstore.extraction.planning.job_file import read_fields
from actstore.extraction.planning.parsing import parsed

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=0)]


class DashboardJob(BaseModel):
    """Dashboards of the features of one hook."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, protected_namespaces=(), title="DashboardJob"
    )

    store: Text = Field(description="Path or URL of the store.")
    hook: Text = Field(description="A stored hook, such as blocks.7.hook_resid_post.")
    sae: Text | None = Field(None, description="Folder of an SAE that SAELens saved.")
    of: Text | None = Field(
        None, description="File with directions [n, d], .npy or .safetensors, in the place of an SAE."
    )
    features: int | Annotated[tuple[int, ...], Field(min_length=1)] | Text | None = Field(
        None,
        description="Numbers of the features: 0:1000 or 3,17. Without sae and of, those of neurons. Default: all.",
    )
    out: Text = Field("dashboard", description="Path or URL of a new folder, or of one to go on with.")
    model: Text | None = Field(
        None,
        description="Hub name or folder of a model, for the tokens whose logits features raise and lower most.",
    )
    k: Count = Field(20, description="Largest rows of each feature, one of each sequence.")
    intervals: Annotated[int, Field(ge=1, le=64)] = Field(
        16, description="Intervals of values above 0, a power of two."
    )
    samples: Count = Field(5, description="Rows from each interval.")
    before: Count = Field(20, description="Tokens in front of each row.")
    after: Count = Field(10, description="Tokens behind each row.")
    seed: Count = Field(0, description="Another one gives other samples.")
    drop: Text | None = Field(
        None, description="Rows to leave out: bos, eos, sep, or token ids, separated by commas."
    )
    resume: Text | None = Field(
        None, description="Path or URL where finished parts of the scan are kept, to go on from them."
    )
    executor: Executor = "inline"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None

    def numbers(self) -> list[int] | range | None:
        """The numbers of the features; None for all.

        Raises:
            JobError: the text is no range.
        """
        if self.features is None or isinstance(self.features, tuple):
            return None if self.features is None else list(self.features)
        if isinstance(self.features, int):
            return [self.features]
        found = re.fullmatch(r"\s*(\d{0,9})\s*:\s*(\d{1,9})\s*", self.features)
        if found is not None and int(found[1] or 0) < int(found[2]):
            return range(int(found[1] or 0), int(found[2]))
        raise JobError(
            f"features are {self.features!r}; give a range such as 0:1000, or numbers such as 3,17"
        )

    def dropped(self) -> list[str | int]:
        """What `scan` leaves out."""
        parts = [part.strip() for part in (self.drop or "").split(",") if part.strip()]
        return [int(part) if part.isdecimal() else part for part in parts]


_EXPECTED: Final = {"features": "should be a range such as 0:1000, or a list of integers"}


def job_of(file: str | None, fields: Mapping[str, Any]) -> DashboardJob:
    """The job that is meant by a file, or None, and fields that take precedence.

    Raises:
        JobError: the file holds no job, or a field is wrong; the message lists every problem with its location.
        StorageError: the file cannot be read.
    """
    if file is None:
        return parsed(DashboardJob, fields, "job", _EXPECTED)
    return parsed(DashboardJob, read_fields(file) | dict(fields), file, _EXPECTED)
