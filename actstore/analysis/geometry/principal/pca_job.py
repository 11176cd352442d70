"""The job of ``actstore pca``: what a user asks for, in a YAML file or as options."""

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from actstore.extraction.planning.execution_fields import Executor, NumWorkers, RayAddress

Text = Annotated[str, Field(min_length=1)]


class PcaJob(BaseModel):
    """Principal components of hooks of a store."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, title="PcaJob")

    hook: Annotated[tuple[Text, ...], Field(min_length=1)] | Text = Field(
        description="Hooks, or globs of them, such as 'blocks.*.hook_resid_post': a list, or separated by commas."
    )
    components: Annotated[int, Field(ge=1)] = Field(16, description="Components of each hook.")
    drop: tuple[Text, ...] | Text | None = Field(
        None,
        description="Tokens whose rows are left out: bos, eos, sep, or ids; a list, or separated by commas.",
    )
    seqpos: Text | None = Field(
        None, description="Positions to take, such as 1: or 0:8 or 5. Default: all of them."
    )
    max_nbytes: Annotated[int, Field(ge=1)] = Field(
        2 << 30, description="The most bytes of the sums of a pass; with less, there are more passes."
    )
    out: Text | None = Field(
        None, description="File to write: .safetensors, or .parquet with a line a component."
    )
    plot: Text | None = Field(
        None, description="PNG to draw: the explained variance, and rows along the first two components."
    )
    color: Text = Field(
        "position",
        description="What colours the rows of the picture: position, or a kept column of the store.",
    )
    resume: Text | None = Field(
        None,
        description="Folder or URL where finished parts are kept, so that the same command goes on from them.",
    )
    executor: Executor = "inline"
    num_workers: NumWorkers = None
    ray_address: RayAddress = None

    @property
    def hooks(self) -> list[str]:
        return list(_listed(self.hook))

    @property
    def dropped(self) -> list[str | int]:
        """Names and ids of tokens whose rows are left out."""
        return [int(one) if one.isdecimal() else one for one in _listed(self.drop or ())]


def _listed(given: tuple[str, ...] | str) -> tuple[str, ...]:
    return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given


EXPECTED: Final = {
    "hook": "should be names of hooks or globs: a list, or separated by commas",
    "drop": "should be names or ids of tokens: a list, or separated by commas",
}
