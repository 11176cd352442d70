"""Turns: writers run side by side, never beside a repair, and nobody waits for a dead process."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actstore.errors import BusyError, StorageError
from actstore.storage.blobs import Blobs
from actstore.storage.local import LocalBlobs
from actstore.store.locking import lease as lease_module
from actstore.store.locking import turns as module
from actstore.store.locking.holder import Holder, is_alive, this_process
from actstore.store.locking.lease import LEASES, LeaseRecord
from actstore.store.locking.turns import (
    REPAIR_KEY,
    Turn,
    lease_tags,
    refuse_beside_living_repair,
    refuse_beside_repair,
    remove_leases,
    repairing,
    writing,
)
from tests.commands import Conversation
from tests.storage.watched import CHANGES, READS, watched

WRITER_KEY = f"{LEASES}/writer-{'0' * 32}.json"
PATIENCE_S = 0.6

HOLDER = """
import sys, time
from actstore.store.locking import turns
from actstore.storage.local import LocalBlobs

with getattr(turns, sys.argv[2])(LocalBlobs(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL_S", 0.05)
    monkeypatch.setattr(lease_module, "PATIENCE_S", PATIENCE_S)
    monkeypatch.setattr(lease_module, "LOOK_S", 0.02)
    monkeypatch.setattr(module, "_POLL_S", 0.02)
    monkeypatch.setattr(module, "_YIELD_S", 0.2)


@pytest.fixture
def started() -> Iterator[list[Conversation]]:
    """Processes that are ended after the test."""
    processes: list[Conversation] = []
    yield processes
    for process in processes:
        process.end()


def holder(url: str, turn: str) -> Conversation:
    """A process that writes or repairs until it is killed."""
    process = Conversation(url, turn, code=HOLDER)
    assert process.answer() == "held"
    return process


def elsewhere(n_renewals: int = 0, age_s: float = 0.0) -> bytes:
    """The lease of a process on another machine."""
    process = Holder(host="node-7", machine="another", pid=41, began=5)
    return LeaseRecord(
        holder="theirs", n_renewals=n_renewals, process=process, renewed=time.time() - age_s
    ).to_bytes()


def test_writers_are_beside_each_other(blobs: Blobs) -> None:
    with writing(blobs) as one, writing(blobs) as other:
        assert one.key != other.key
        one.check()
        other.check()
        assert len(blobs.names(LEASES)) == 2
    assert blobs.names(LEASES) == []


def test_no_repair_beside_a_writer(blobs: Blobs) -> None:
    with writing(blobs) as held:
        message = rf"is being written to by process {os.getpid()} on .*last heard"
        with pytest.raises(BusyError, match=message), repairing(blobs):
            pytest.fail("both are at work")
        held.check()
        assert len(blobs.names(LEASES)) == 1
    with repairing(blobs) as turn:
        turn.check()
    assert blobs.names(LEASES) == []


def test_no_writer_and_no_other_repair_beside_a_repair(blobs: Blobs) -> None:
    with repairing(blobs):
        for turn in (writing, repairing):
            message = rf"^.* is being repaired by process {os.getpid()} on .*$"
            with pytest.raises(BusyError, match=message), turn(blobs):
                pytest.fail("both are at work")
        assert [f"{LEASES}/{name}" for name in blobs.names(LEASES)] == [REPAIR_KEY]


def test_a_repair_that_begins_at_the_same_moment_gives_way_to_the_writer(blobs: Blobs) -> None:
    """The writer looks, the repair makes its lease, the writer makes its own: each sees the other."""
    threads: list[threading.Thread] = []
    create = blobs.create

    def late(key: str, *args: object, **keywords: object) -> bool:
        if key.startswith(f"{LEASES}/writer-"):
            create(REPAIR_KEY, [LeaseRecord.of("theirs", 0).to_bytes()])
            threads.append(threading.Timer(0.1, blobs.delete, [REPAIR_KEY]))
            threads[0].start()
        return create(key, *args, **keywords)  # type: ignore[arg-type]

    blobs.create = late  # type: ignore[method-assign]
    with writing(blobs) as held:
        assert blobs.head(REPAIR_KEY) is None
        held.check()
    threads[0].join()


def test_a_repair_that_had_looked_before_stays(blobs: Blobs) -> None:
    create = blobs.create

    def late(key: str, *args: object, **keywords: object) -> bool:
        if key.startswith(f"{LEASES}/writer-"):
            create(REPAIR_KEY, [LeaseRecord.of("theirs", 0).to_bytes()])
        return create(key, *args, **keywords)  # type: ignore[arg-type]

    blobs.create = late  # type: ignore[method-assign]
    with pytest.raises(BusyError, match="is being repaired"), writing(blobs):
        pytest.fail("both are at work")
    assert [f"{LEASES}/{name}" for name in blobs.names(LEASES)] == [REPAIR_KEY]


@pytest.mark.parametrize("turn", ["writing", "repairing"])
def test_a_killed_process_of_this_machine_keeps_nobody_out(
    tmp_path: Path, started: list[Conversation], monkeypatch: pytest.MonkeyPatch, turn: str
) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    started.append(holder(blobs.url, turn))
    with pytest.raises(BusyError, match=f"process {started[0].pid} on "), repairing(blobs):
        pytest.fail("both are at work")
    started[0].send_signal(signal.SIGKILL)
    started[0].wait()
    monkeypatch.setattr(lease_module, "PATIENCE_S", 3600.0)  # waiting is not what removes it
    if turn == "repairing":
        with writing(blobs):
            assert blobs.head(REPAIR_KEY) is None
    with repairing(blobs):
        assert [f"{LEASES}/{name}" for name in blobs.names(LEASES)] == [REPAIR_KEY]


def test_a_stopped_process_is_waited_for_and_then_out_of_its_turn(
    tmp_path: Path, started: list[Conversation]
) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    started.append(holder(blobs.url, "writing"))
    (name,) = blobs.names(LEASES)
    record = LeaseRecord.read(blobs, f"{LEASES}/{name}")
    turn = Turn(f"{LEASES}/{name}", record.holder)
    turn.check(blobs)
    started[0].send_signal(signal.SIGSTOP)
    since = time.monotonic()
    with repairing(blobs):
        assert time.monotonic() - since >= PATIENCE_S
        with pytest.raises(
            BusyError, match=r"the lease of this run at .* is gone: the store was deleted or repaired"
        ):
            turn.check(blobs)


@pytest.mark.parametrize("content", [None, b""], ids=["removed", "not written yet"])
def test_a_lease_that_is_away_for_a_moment_is_not_lost(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    """Some storage replaces a file by removing it before moving another one there."""
    monkeypatch.setattr(lease_module, "LOOK_S", 0.5)
    mine = LeaseRecord.of("mine", 0).to_bytes()
    if content is not None:
        blobs.create(WRITER_KEY, [content])

    def come_back() -> None:
        blobs.delete(WRITER_KEY)
        blobs.create(WRITER_KEY, [mine])

    thread = threading.Timer(0.1, come_back)
    thread.start()
    Turn(WRITER_KEY, "mine").check(blobs)
    thread.join()


def test_a_process_elsewhere_lives_while_it_renews(blobs: Blobs) -> None:
    """Its clock may differ from ours, so only renewals count."""
    blobs.create(WRITER_KEY, [elsewhere(age_s=-1e6)])

    def renew() -> None:
        info = blobs.head(WRITER_KEY)
        assert info is not None
        assert blobs.replace(WRITER_KEY, [elsewhere(1)], expected=info.tag)

    thread = threading.Timer(0.2, renew)
    thread.start()
    with pytest.raises(BusyError, match="process 41 on node-7"), repairing(blobs):
        pytest.fail("both are at work")
    thread.join()
    since = time.monotonic()
    with repairing(blobs):
        assert time.monotonic() - since >= PATIENCE_S
        assert blobs.head(WRITER_KEY) is None


@pytest.mark.parametrize(("age_s", "is_refused"), [(0.0, True), (60.0, False), (-60.0, False)])
def test_who_only_looks_neither_waits_for_a_repair_nor_removes_it(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, age_s: float, is_refused: bool
) -> None:
    monkeypatch.setattr(lease_module, "PATIENCE_S", 30.0)
    blobs.create(REPAIR_KEY, [elsewhere(age_s=age_s)])
    since = time.monotonic()
    with pytest.raises(BusyError, match="node-7") if is_refused else contextlib.nullcontext():
        refuse_beside_living_repair(watched(blobs, before=only_reads))
    assert time.monotonic() - since < 15.0
    assert blobs.head(REPAIR_KEY) is not None


def only_reads(call: str, key: str) -> None:
    assert call in READS | {"head"}, key


def test_a_repair_that_is_gone_and_cannot_be_removed_keeps_no_writer_out(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.create(REPAIR_KEY, [elsewhere(age_s=60.0)])

    def refuse(call: str, key: str) -> None:
        if key == REPAIR_KEY and call in CHANGES:
            raise StorageError("no permission")

    with writing(watched(blobs, before=refuse)) as held:
        monkeypatch.setattr(lease_module, "PATIENCE_S", 3600.0)  # a slow renewal must not lose it
        held.check()


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}'], ids=["empty", "no JSON", "another"])
def test_a_lease_that_cannot_be_read_is_waited_for(blobs: Blobs, content: bytes) -> None:
    blobs.create(WRITER_KEY, [content])
    with repairing(blobs):
        assert blobs.head(WRITER_KEY) is None


def test_leases_of_processes_that_may_live_stay(blobs: Blobs) -> None:
    gone = this_process().model_copy(update={"began": 1})
    leases = {
        "writer-gone": LeaseRecord(holder="a", n_renewals=0, process=gone).to_bytes(),
        "writer-here": LeaseRecord.of("b", 0).to_bytes(),
        "writer-elsewhere": elsewhere(),
        "writer-silent": elsewhere(),
        "0000-00000001": LeaseRecord.of("c", 0).to_bytes(),
    }
    for name, data in leases.items():
        blobs.create(f"{LEASES}/{name}.json", [data])
    tags = lease_tags(blobs)
    assert len(tags) == 5
    del tags[f"{LEASES}/writer-elsewhere.json"]  # it was made later
    tags[f"{LEASES}/writer-here.json"] = "renewed"
    remove_leases(blobs, tags, PATIENCE_S / 2, is_sealed=False)
    assert blobs.names(LEASES) == [
        "0000-00000001.json", "writer-elsewhere.json", "writer-here.json", "writer-silent.json"
    ]  # fmt: skip
    remove_leases(blobs, tags, PATIENCE_S * 2, is_sealed=True)
    assert blobs.names(LEASES) == ["writer-elsewhere.json", "writer-here.json"]


def test_state_of_processes() -> None:
    own = this_process()
    assert own.pid == os.getpid()
    assert is_alive(own) is True
    assert is_alive(own.model_copy(update={"began": own.began + 1})) is False
    assert is_alive(own.model_copy(update={"machine": "another"})) is None
    assert is_alive(Holder()) is None
    with subprocess.Popen(["sleep", "600"]) as child:
        stat = Path(f"/proc/{child.pid}/stat").read_text()
        process = own.model_copy(update={"pid": child.pid, "began": int(stat.rsplit(")", 1)[1].split()[19])})
        assert is_alive(process) is True
        child.send_signal(signal.SIGSTOP)
        while "T (stopped)" not in Path(f"/proc/{child.pid}/status").read_text():
            time.sleep(0.01)
        assert is_alive(process) is None
        child.kill()
        while "Z (zombie)" not in Path(f"/proc/{child.pid}/status").read_text():
            time.sleep(0.01)  # nobody has waited for it yet
        assert is_alive(process) is False
    assert is_alive(process) is False


def test_a_process_that_proc_does_not_show_may_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """``/proc`` is mounted with hidepid=2, and the process belongs to another user."""
    with subprocess.Popen(["sleep", "600"]) as child:
        hidden = Path(f"/proc/{child.pid}/stat")
        process = this_process().model_copy(update={"pid": child.pid})
        real = Path.read_text

        def read_text(path: Path, *args: Any, **keywords: Any) -> str:
            if path == hidden:
                raise FileNotFoundError(path)
            return real(path, *args, **keywords)

        monkeypatch.setattr(Path, "read_text", read_text)
        if os.geteuid() == 0:
            os.seteuid(65_534)  # a user who may not send it signals, either
        try:
            assert is_alive(process) is None
        finally:
            os.seteuid(os.getuid())
            child.kill()
            child.wait()
        assert is_alive(process) is False


def test_storage_that_fails_is_no_free_turn(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_key: str) -> None:
        raise StorageError("no connection")

    monkeypatch.setattr(blobs, "head", fail)
    with pytest.raises(StorageError, match="no connection"):
        refuse_beside_repair(blobs)
