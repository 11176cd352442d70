"""Leases: one process at a time holds them, and a dead holder does not keep others out."""

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actstore.errors import StorageError
from actstore.storage.blobs import Blobs, Bytes
from actstore.storage.local import LocalBlobs
from actstore.store.locking import lease as lease_module
from actstore.store.locking.lease import LEASES, PATIENCE_S, LeaseRecord, lease
from tests.commands import Conversation

KEY = f"{LEASES}/0000-00000007.json"
NAME = "0000-00000007"
N_PROCESSES, N_TURNS = 4, 5
FOREIGN = LeaseRecord(holder="another", n_renewals=3)

# Each process increments a number in a file, and would notice another one doing so.
WORKER = """
import sys
from pathlib import Path
from actstore.store.locking import lease as module
from actstore.storage.local import LocalBlobs

module._POLL_S = 0.005
folder, n_turns = Path(sys.argv[1]), int(sys.argv[2])
blobs = LocalBlobs(folder / "store")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(n_turns):
    with module.lease(blobs, "0000-00000007") as held:
        (folder / "inside").mkdir()
        n = int((folder / "n").read_text())
        (folder / "n").write_text(str(n + 1))
        held.check()
        (folder / "inside").rmdir()
"""
HOLDER = """
import sys, time
from actstore.store.locking import lease as module
from actstore.storage.local import LocalBlobs

module.RENEWAL_S = 0.05
with module.lease(LocalBlobs(sys.argv[1]), "0000-00000007"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "RENEWAL_S", 0.02)
    monkeypatch.setattr(lease_module, "PATIENCE_S", 1.0)
    monkeypatch.setattr(lease_module, "_POLL_S", 0.02)
    monkeypatch.setattr(lease_module, "LOOK_S", 0.02)


@pytest.fixture
def processes() -> Iterator[list[Conversation]]:
    """Processes that are ended after the test."""
    started: list[Conversation] = []
    yield started
    for process in started:
        process.end()


def record(blobs: Blobs) -> LeaseRecord | None:
    return LeaseRecord.read_if_there(blobs, KEY)


def take_over(blobs: Blobs) -> None:
    """Take the lease, as another process does that has waited long enough."""
    while True:
        info = blobs.head(KEY)
        assert info is not None
        if blobs.replace(KEY, [FOREIGN.to_bytes()], expected=info.tag):
            return


def test_held_and_given_back(blobs: Blobs) -> None:
    with lease(blobs, NAME) as held:
        assert record(blobs) is not None
        held.check()
    assert blobs.names(LEASES) == []


def test_given_back_after_an_error(blobs: Blobs) -> None:
    with pytest.raises(ZeroDivisionError), lease(blobs, NAME):
        _ = 1 / 0
    assert blobs.names(LEASES) == []


def test_two_names_are_two_leases(blobs: Blobs) -> None:
    with lease(blobs, NAME) as one, lease(blobs, "0000-00000008") as other:
        one.check()
        other.check()


def test_one_process_at_a_time(tmp_path: Path, processes: list[Conversation]) -> None:
    (tmp_path / "n").write_text("0")
    processes += [Conversation(str(tmp_path), str(N_TURNS), code=WORKER) for _ in range(N_PROCESSES)]
    assert [process.answer() for process in processes] == ["ready"] * N_PROCESSES
    for process in processes:
        process.say("go")
    assert [process.wait(60) for process in processes] == [0] * N_PROCESSES
    assert int((tmp_path / "n").read_text()) == N_PROCESSES * N_TURNS
    assert LocalBlobs(tmp_path / "store").names(LEASES) == []


@pytest.mark.parametrize("waits", [False, True], ids=["before", "while another one waits"])
def test_taken_over_from_a_process_that_was_killed(
    local: LocalBlobs, processes: list[Conversation], waits: bool
) -> None:
    holders: list[str] = []

    def take() -> None:
        with lease(local, NAME) as held:
            held.check()
            current = record(local)
            assert current is not None
            holders.append(current.holder)

    processes.append(Conversation(local.url, code=HOLDER))
    assert processes[0].answer() == "held"
    before = record(local)
    assert before is not None
    waiting = threading.Thread(target=take, daemon=True)
    if waits:
        waiting.start()
        # Meanwhile the lease was renewed, so its first tag is no longer valid.
        while (now := record(local)) is None or now.n_renewals < before.n_renewals + 3:
            assert processes[0].poll() is None
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    if not waits:
        waiting.start()
    waiting.join(30)
    assert len(holders) == 1
    assert holders != [before.holder]
    assert local.names(LEASES) == []


def test_not_taken_from_a_process_that_renews_it(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is counted in renewals, a quarter of the patience each, so that slow storage does not matter."""
    counts: Counter[str] = Counter()
    entered = threading.Event()
    looks = threading.Semaphore(0)

    def count(name: str) -> None:
        call = getattr(blobs, name)

        def counted(*args: Any, **keywords: Any) -> Any:
            if name == "replace" and threading.current_thread() is not waiting:
                # The waiting process looks several times between two renewals, and sees the same lease.
                for _ in range(3):
                    looks.acquire(timeout=60)
            counts[name] += 1
            if name == "create":
                looks.release()
            return call(*args, **keywords)

        monkeypatch.setattr(blobs, name, counted)

    def wait_for_it() -> None:
        with lease(blobs, NAME):
            entered.set()
            looks.release(1000)  # nobody looks any more

    count("create")
    count("replace")
    clock = SimpleNamespace(
        monotonic=lambda: counts["replace"] * lease_module.PATIENCE_S / 4, sleep=time.sleep
    )
    monkeypatch.setattr(lease_module, "time", clock)
    waiting = threading.Thread(target=wait_for_it)
    with lease(blobs, NAME) as held:
        waiting.start()
        # Three times the patience of the waiting process, which has looked often.
        while counts["replace"] < 12 or counts["create"] < 13:
            assert not entered.wait(0.01)
            assert held._thread.is_alive()
            assert waiting.is_alive()
        held.check()
        current = record(blobs)
        assert current is not None
        assert current.n_renewals > 2
        assert not entered.is_set()
    waiting.join()
    assert entered.is_set()


def test_who_lost_it_is_told_and_leaves_it_to_the_new_holder(blobs: Blobs) -> None:
    with lease(blobs, NAME) as held:
        take_over(blobs)
        with pytest.raises(StorageError) as caught:
            held.check()
        assert str(caught.value) == (
            f"another process took over {blobs.url}/{KEY} while this one was stopped; run the same command again"
        )
    assert record(blobs) == FOREIGN


def test_one_that_was_removed_is_lost(blobs: Blobs) -> None:
    with lease(blobs, NAME) as held:
        held._released.set()  # no renewal between the two lines
        held._thread.join()
        blobs.delete(KEY)
        with pytest.raises(StorageError, match="took over"):
            held.check()


class Removing(LocalBlobs):
    """Storage that replaces a blob slowly, by removing it first."""

    n_replaced = 0

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        info = self.head(key)
        assert info is not None
        if info.tag != expected:
            return False
        self.delete(key)
        time.sleep(0.2)
        self.n_replaced += 1
        return self.create(key, parts)


def test_a_lease_that_is_being_renewed_is_not_taken_for_lost(tmp_path: Path) -> None:
    blobs = Removing(tmp_path / "store")
    with lease(blobs, NAME) as held:
        while blobs.n_replaced < 4:
            held.check()


class Troubled(LocalBlobs):
    """Storage in which a test decides the replies of `replace`."""

    n_replaced = 0
    trouble: Exception | None = None

    def replace(self, key: str, parts: Sequence[Bytes], *, expected: str) -> bool:
        assert super().replace(key, parts, expected=expected)
        self.n_replaced += 1
        if self.trouble is not None:
            raise self.trouble
        return False  # as if the reply was lost, and the repeated request meets the new content

    def delete(self, key: str) -> None:
        if self.trouble is not None and key == KEY:
            raise self.trouble
        super().delete(key)

    def create(self, key: str, parts: Iterable[Bytes], *, metadata: Mapping[str, str] | None = None) -> bool:
        self.n_replaced = 0
        return super().create(key, parts, metadata=metadata)


@pytest.mark.parametrize("trouble", [None, StorageError("a bad moment")], ids=["lost reply", "error"])
def test_trouble_with_storage_does_not_cost_the_lease(tmp_path: Path, trouble: Exception | None) -> None:
    blobs = Troubled(tmp_path / "store")
    blobs.trouble = trouble
    renewed = threading.Event()
    with lease(blobs, NAME) as held:
        while blobs.n_replaced < 3:
            assert not renewed.wait(0.01)
        held.check()
    # Without permission to delete, the lease stays, and others wait until it expires.
    assert blobs.names(LEASES) == ([] if trouble is None else [KEY.rsplit("/", 1)[1]])


def test_who_cannot_renew_it_is_told_so_by_its_own_clock(blobs: Blobs) -> None:
    """Others may have taken the lease, and storage that cannot be reached does not tell."""
    with lease(blobs, NAME) as held:
        held.check()
        held._renewed -= PATIENCE_S
        with pytest.raises(StorageError, match="took over"):
            held.check()
