"""Imports and set-up that take a process long, done once before it is forked. Nothing here may start threads.

Each process has one server of forks, for the commands of `tests.commands` and for `tests.faults.child`.
"""

import contextlib
import gc
import importlib

gc.disable()

for name in (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.gpt2.modeling_gpt2",
    "pandas",  # pyarrow imports it in many places
    "pyarrow.pandas_compat",
    "pyarrow.parquet",
    "pyarrow.vendored.version",
    "fsspec.implementations.chained",
    "s3fs",
    "obstore.store",
    "click",
    "fastapi",
    "uvicorn.protocols.http.httptools_impl",
    "uvloop",
    "tenacity",
    "zarr",
    "actstore.extraction.extract",
    "actstore.extraction.computing.inline",
    "actstore.storage.local",
    "tests.faults.child",
):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)

with contextlib.suppress(ImportError, AttributeError):
    # Loading any model needs this table of hundreds of patterns, which transformers builds and keeps.
    importlib.import_module("transformers.conversion_mapping").get_checkpoint_conversion_mapping("gpt2")

# What is imported stays. A garbage collection in a forked process would look through it, and copy its memory.
gc.freeze()
gc.enable()
