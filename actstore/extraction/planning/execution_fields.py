"""Fields of a job that say where it runs, and nothing of what comes out."""

from typing import Annotated

from pydantic import Field

Executor = Annotated[
    str,
    Field(
        min_length=1, description="inline (this process), process (one for each GPU of this machine) or ray."
    ),
]
NumWorkers = Annotated[
    Annotated[int, Field(ge=1)] | None,
    Field(description="Workers of process and ray. Default: one a GPU, or one if there is none."),
]
RayAddress = Annotated[
    str | None, Field(description="Ray cluster to join, such as auto. Default: start one on this machine.")
]
Device = Annotated[
    str | None, Field(description="Device of a worker, such as cuda:0. Default: a GPU if any.")
]
