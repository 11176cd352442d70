"""Writing cached activations of SAELens to a store, segment by segment, as an extraction does."""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actstore._version import __version__
from actstore.errors import HookError, JobError, PlanMismatchError
from actstore.extraction.claim import claim
from actstore.extraction.computing.buffers import SegmentBuffers
from actstore.extraction.computing.segment_commit import SegmentWriter
from actstore.extraction.planning.differences import differences
from actstore.extraction.planning.growth import Place
from actstore.extraction.planning.job_model import absolute_model
from actstore.extraction.planning.planning import free_place
from actstore.extraction.planning.stored_hooks import stored_hooks
from actstore.extraction.planning.tokenising.packed_tokens import PackedTokens
from actstore.facade import Store
from actstore.hooks.families.stored_config import UNKNOWN_MODEL
from actstore.hooks.loading.pretrained import load_config
from actstore.hooks.naming.hook_points import point_of
from actstore.hooks.naming.names import layer_of, stored_as
from actstore.integrations.saelens.cached_rows import TOKENS, CachedRows
from actstore.opening import open_store
from actstore.storage.blobs import Blobs
from actstore.storage.look_first import LookFirst
from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe
from actstore.store.format.batches import batches_of
from actstore.store.format.dtypes import dtype as dtype_of
from actstore.store.format.layout import segment_size
from actstore.store.format.plan import (
    FIRST_RUN,
    IMPORTED,
    HookArray,
    ModelIdentity,
    Plan,
    Request,
    Segment,
    SourceFileIdentity,
    TokensIdentity,
)
from actstore.store.locking.turns import writing
from actstore.store.records.commit import CommitRecord, Environment, commit_key, committed
from actstore.store.records.run import read_runs
from actstore.store.records.seal import remove_scratch, seal
from actstore.store.statistics.moments import Moments
from actstore.store.verifying.read_back import read_back
from actstore.tokens import Rows, spool

DType = Literal["float32", "bfloat16", "float16"]
_BATCH_TOKENS: Final = 4096
_BLOCK_ROWS: Final = 1024
"""Number of sequences whose token ids are read together."""


def import_cache(
    folder: Path | str,
    url: str,
    *,
    dtype: DType = "float32",
    model: str | None = None,
    on_bytes: Callable[[int], None] = lambda _nbytes: None,
) -> Store:
    """Write a folder of SAELens' cached activations to a new store.

    If it is killed, the same call continues after the segments that are committed. It takes the memory of one segment,
    about 64 MB. Since it is not known what computed the values, the store says that they were imported, and whatever
    would run the model again refuses it.

    Args:
        folder: a ``cached_activations_path``, as ``CacheActivationsRunner`` or `export_cache` wrote it.
        url: the URL of the store. There may be nothing yet, or an incomplete import of the same folder.
        dtype: the type to store. All types but float32 round.
        model: Hub name or folder of the model if it is known, for its configuration: hooks then have their axes and can
            be named in all spellings.
        on_bytes: called with the stored bytes of each segment, including those that were committed before.

    Raises:
        HookError: the model has no such hook.
        JobError: a value does not fit the type, or the hook of the model and that of the cache differ in width.
        ModelError: there is no such model.
        PlanMismatchError: something else is stored at this URL.
        StorageError: the folder is no cache, or is damaged, or writing failed.
    """
    rows = CachedRows.open(folder)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise JobError(f"dtype is {dtype!r}; it can be float32, bfloat16 or float16")
    packed = _packed(rows)
    plan = _plan(rows, packed, dtype, model)
    blobs = open_blobs(url)
    existing = read_runs(blobs)
    if existing:
        # An earlier version, which stored no norms, may have begun the import.
        plan = plan.model_copy(update={"norms": existing[0].plan.norms})
    if not existing:
        free_place(blobs, Place(FIRST_RUN, plan.hook_names))
    elif len(existing) > 1 or existing[0].plan != plan:
        differing = differences(existing[0].plan.request, plan.request)
        raise PlanMismatchError(
            f"the store at {blobs.url} is not an import of {rows.folder} like this one: "
            f"{'; '.join(differing) or 'it has other tokens or segments'}. Choose another place"
        )
    elif existing[0].finished is not None:
        on_bytes(plan.activation_nbytes)
        return open_store(url)
    is_conditional = probe(blobs)
    blobs = blobs if is_conditional else LookFirst(blobs)
    with writing(blobs) as held:
        claim(blobs, plan)
        packed.store(blobs, plan)
        _write_segments(blobs, plan, rows, packed, held.check, on_bytes, is_conditional=is_conditional)
        read = seal(blobs)
        read_back(blobs, plan, are_records_read=plan.run in read)
    remove_scratch(blobs)
    return open_store(url)


def _write_segments(
    blobs: Blobs,
    plan: Plan,
    rows: CachedRows,
    packed: PackedTokens,
    fence: Callable[[], None],
    on_bytes: Callable[[int], None],
    *,
    is_conditional: bool,
) -> None:
    """Write the segments that are not committed."""
    done = committed(blobs, plan)
    writer = SegmentWriter(blobs, plan, is_strict=False, is_conditional=is_conditional, fence=fence)
    try:
        buffers = SegmentBuffers(plan, torch.device("cpu"))
        for segment in plan.segments():
            if segment.index not in done:
                record, norms = _fill(buffers, rows, plan, segment)
                lengths = packed.rows("lengths", segment.start, segment.stop)
                record = writer.write(
                    segment, buffers.rows(segment), norms, record, lengths, batches_of(plan.request, lengths)
                )
                if not is_conditional:
                    fence()
                    blobs.create(commit_key(plan.run, segment.index), [record.to_bytes()])
            on_bytes(plan.activations(plan.request.hooks[0]).data_nbytes(segment.index))
    finally:
        writer.close()


def _packed(rows: CachedRows) -> PackedTokens:
    """Pack all token ids; each row is one document of the source."""
    started = time.perf_counter()
    n_sequences, length, _ = rows.shape

    def blocks() -> Iterator[Rows]:
        for start in range(0, n_sequences, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, n_sequences)
            shape = (stop - start, length)
            yield Rows(
                rows.tokens(start, stop),
                np.full(shape[0], length, np.int32),
                np.broadcast_to(np.arange(start, stop)[:, None], shape),
                np.broadcast_to(np.arange(length, dtype=np.int32), shape),
                np.zeros(shape[0], np.int32),
            )

    folder = Path(tempfile.mkdtemp(prefix="actstore-tokens-"))
    try:
        spooled = spool(blocks(), folder)
    finally:
        # Mapped files stay readable after their names are gone.
        shutil.rmtree(folder, ignore_errors=True)
    return PackedTokens(spooled, None, time.perf_counter() - started)


def _plan(rows: CachedRows, packed: PackedTokens, dtype: DType, model: str | None) -> Plan:
    n_sequences, length, d_in = rows.shape
    hook, identity = _hook(rows, model)
    # A power of two, as are the rows of whole pages: a segment must hold whole multiples of both.
    batch_size = 1 << max(0, (_BATCH_TOKENS // length).bit_length() - 1)
    tokens = TokensIdentity(
        source=str(rows.folder),
        files=tuple(SourceFileIdentity(name=file.name, nbytes=file.stat().st_size) for file in rows.files),
        column=TOKENS,
        documents="file",
        tokenizer=None,
        tokenizer_sha256=None,
        packing="concat",
        context_length=length,
        begin_batch_token=None,
        begin_sequence_token=None,
        separator_token=None,
        pad_token=None,
        max_tokens=None,
        skip_sequences=0,
        seed=None,
    )
    return Plan(
        run=FIRST_RUN,
        tokens_of=FIRST_RUN,
        request=Request(
            model=identity,
            tokens=tokens,
            hooks=(hook,),
            dtype=dtype,
            batch_size=batch_size,
            compression=None,
            covariance=False,
        ),
        n_sequences=n_sequences,
        n_tokens=packed.spool.n_tokens,
        n_documents=packed.spool.n_documents,
        tokens_sha256=packed.sha256(),
        segment_size=segment_size(
            [length * d_in * dtype_of(dtype).itemsize], n_sequences=n_sequences, batch_size=batch_size
        ),
        norms=hook.has_norms,
    )


def _hook(rows: CachedRows, model: str | None) -> tuple[HookArray, ModelIdentity]:
    """The hook in the form that stores use, and what is known of the model."""
    _, length, d_in = rows.shape
    fingerprint = f"{IMPORTED}saelens:{rows.fingerprint}"
    if model is None:
        name = stored_as(rows.hook)
        point = point_of(name)
        axes = ("d_in",) if point is None or len(point.axes_in_store) != 1 else point.axes_in_store
        try:
            hook = HookArray(name=name, shape=(d_in,), axes=axes)
        except ValueError as error:
            raise HookError(
                f"the hook {rows.hook!r} of the cache has a name that no store can have; name the model"
            ) from error
        return hook, ModelIdentity(
            name=UNKNOWN_MODEL,
            revision=None,
            fingerprint=fingerprint,
            model_type=UNKNOWN_MODEL,
            n_layers=1 + (layer_of(name) or 0),
            config={"model_type": UNKNOWN_MODEL},
        )
    config = load_config(model)
    (hook,) = stored_hooks(config, [rows.hook], length)
    if np.prod(hook.shape) != d_in:
        raise JobError(
            f"{hook.name} of {model} has {np.prod(hook.shape)} elements, and rows of the cache have {d_in}; name the "
            "model that the cache was made with, or none"
        )
    return hook, ModelIdentity(
        name=absolute_model(model),
        revision=None,
        fingerprint=fingerprint,
        model_type=config.model_type,
        n_layers=config.num_hidden_layers,
        config=json.loads(config.to_json_string()),
    )


def _fill(
    buffers: SegmentBuffers, rows: CachedRows, plan: Plan, segment: Segment
) -> tuple[CommitRecord, dict[str, NDArray[np.float32]]]:
    """Fill the buffers with a segment; return its record without shards, and its norms."""
    (hook,), request = plan.request.hooks, plan.request
    moments = Moments(request.hooks, "cpu", covariance=False)
    wanted: torch.dtype = getattr(torch, request.dtype)
    for start in range(0, segment.n_sequences, request.batch_size):
        stop = min(start + request.batch_size, segment.n_sequences)
        # A copy: torch warns of mapped memory, which cannot be written to.
        given = torch.from_numpy(rows.values(segment.start + start, segment.start + stop).copy())
        value = given.to(wanted)
        if not torch.equal(value.isfinite(), given.isfinite()):
            raise JobError(
                f"values of {rows.hook} in the sequences {segment.start + start}:{segment.start + stop} are too large "
                f"for {request.dtype}; choose bfloat16 or float32, and another place"
            )
        value = value.view(len(value), plan.context_length, *hook.shape)
        buffers.put(hook.name, start, len(value), value)
        moments.add(hook.name, value, torch.ones(value.shape[:2], dtype=torch.bool))
    record = CommitRecord(
        segment=segment.index,
        n_sequences=segment.n_sequences,
        n_tokens=segment.n_sequences * plan.context_length,
        shards={},
        statistics=moments.records(),
        golden=None,
        environment=Environment(
            actstore=__version__,
            engine="imported",
            torch=str(torch.__version__),
            transformers="none",
            device="cpu",
            attention="none",
            batch=(request.batch_size, plan.context_length),
        ),
    )
    return record, moments.norms(plan.width)
