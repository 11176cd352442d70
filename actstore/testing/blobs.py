"""The tests that every storage must pass. Subclass `BlobsConformance` and provide the fixture ``blobs``.

class TestMine(BlobsConformance):
    @pytest.fixture
    def blobs(self, tmp_path: Path) -> Blobs:
        return MyBlobs(tmp_path)
"""

import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore.errors import StorageError
from actstore.storage.blobs import BlobNotFoundError, Blobs, are_files
from actstore.storage.probing import probe

DIGITS = b"0123456789"
_N_THREADS = 8
_T = TypeVar("_T")


def noise(nbytes: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes, which cannot be right by chance."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def at_once(act: Callable[[int], _T]) -> list[_T]:
    """The results of eight threads that start at the same moment."""
    gate = threading.Barrier(_N_THREADS)
    results: dict[int, _T] = {}
    errors: list[BaseException] = []

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = act(i)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(_N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[i] for i in range(_N_THREADS)]


class BlobsConformance:
    """One test for each guarantee of `actstore.storage.blobs.Blobs`.

    The fixture ``blobs`` gives new, empty storage to each test.
    """

    @pytest.fixture
    def blobs(self) -> Blobs:
        raise NotImplementedError("provide a fixture `blobs` that gives empty storage")

    # Writing.

    def test_created_blob_reads_back(self, blobs: Blobs) -> None:
        assert blobs.create("a/b/c", [DIGITS]) is True
        assert bytes(blobs.read("a/b/c")) == DIGITS

    def test_parts_are_written_one_after_the_other(self, blobs: Blobs) -> None:
        data, frozen = noise(1 << 20), noise(100, seed=1)
        frozen.flags.writeable = False
        assert blobs.create("parts", [data, b"", frozen, DIGITS])
        assert bytes(blobs.read("parts")) == data.tobytes() + frozen.tobytes() + DIGITS

    @pytest.mark.parametrize(
        "parts", [[], [b""], [b"", np.empty(0, np.uint8)]], ids=["none", "empty", "both"]
    )
    def test_blob_may_be_empty(self, blobs: Blobs, parts: list[bytes]) -> None:
        assert blobs.create("empty", parts)
        assert not blobs.create("empty", [DIGITS])
        info = blobs.head("empty")
        assert info is not None
        assert info.nbytes == 0
        assert bytes(blobs.read("empty")) == b""
        blobs.read_into("empty", 0, np.empty(0, np.uint8))

    def test_large_blob(self, blobs: Blobs) -> None:
        data = noise((16 << 20) + 4096)
        assert blobs.create("large", [data, DIGITS])
        assert np.array_equal(np.frombuffer(blobs.read("large", 0, data.nbytes), np.uint8), data)
        out = np.zeros(12 << 20, np.uint8)
        blobs.read_into("large", 12_345, out)
        assert np.array_equal(out, data[12_345 : 12_345 + out.nbytes])
        assert bytes(blobs.read("large", data.nbytes - 5)) == data[-5:].tobytes() + DIGITS

    def test_second_create_loses_and_changes_nothing(self, blobs: Blobs) -> None:
        assert blobs.create("a", [DIGITS])
        before = blobs.head("a")
        assert blobs.create("a", [b"other"]) is False
        assert blobs.create("a", [DIGITS]) is False
        assert bytes(blobs.read("a")) == DIGITS
        assert blobs.head("a") == before

    def test_key_can_be_created_again_after_delete(self, blobs: Blobs) -> None:
        assert blobs.create("a/b", [b"first"])
        blobs.delete("a/b")
        assert blobs.create("a/b", [b"second"])
        assert bytes(blobs.read("a/b")) == b"second"

    def test_one_of_racing_creates_wins(self, blobs: Blobs) -> None:
        for turn in range(2):
            key = f"race/{turn}"
            won = at_once(lambda i, key=key: blobs.create(key, [noise(100_000, seed=i), b"."]))  # type: ignore[misc]
            assert sorted(won) == [False] * (_N_THREADS - 1) + [True]
            assert bytes(blobs.read(key)) == noise(100_000, seed=won.index(True)).tobytes() + b"."

    def test_metadata_is_kept_or_not_there_at_all(self, blobs: Blobs) -> None:
        given = {"crc32c": "0badf00d", "writer": "host-1"}
        assert blobs.create("a", [DIGITS], metadata=given)
        info = blobs.head("a")
        assert info is not None
        assert not info.metadata or given.items() <= info.metadata.items()

    # Replacing.

    def test_replaced_blob_has_the_new_content_and_another_tag(self, blobs: Blobs) -> None:
        blobs.create("a", [DIGITS])
        tag = _tag(blobs, "a")
        assert blobs.replace("a", [b"98765", b"43210"], expected=tag) is True
        assert bytes(blobs.read("a")) == DIGITS[::-1]
        assert _tag(blobs, "a") != tag
        assert blobs.replace("a", [b"shorter"], expected=_tag(blobs, "a"))
        assert bytes(blobs.read("a")) == b"shorter"

    def test_tag_stays_while_the_content_stays(self, blobs: Blobs) -> None:
        blobs.create("a", [DIGITS])
        tag = _tag(blobs, "a")
        blobs.create("a", [b"other"])
        blobs.read("a")
        assert _tag(blobs, "a") == tag

    def test_replace_with_an_old_tag_changes_nothing(self, blobs: Blobs) -> None:
        blobs.create("a", [DIGITS])
        old = _tag(blobs, "a")
        blobs.replace("a", [b"second"], expected=old)
        assert blobs.replace("a", [b"third"], expected=old) is False
        assert bytes(blobs.read("a")) == b"second"

    def test_replace_makes_no_blob(self, blobs: Blobs) -> None:
        blobs.create("a", [DIGITS])
        tag = _tag(blobs, "a")
        blobs.delete("a")
        assert blobs.replace("a", [b"x"], expected=tag) is False
        assert blobs.head("a") is None

    def test_one_of_racing_replaces_wins(self, blobs: Blobs) -> None:
        blobs.create("a", [DIGITS])
        for _ in range(2):
            tag = _tag(blobs, "a")
            bodies = [noise(50_000, seed=hash((tag, i)) & 0xFFFF) for i in range(_N_THREADS)]
            won = at_once(lambda i, bodies=bodies, tag=tag: blobs.replace("a", [bodies[i]], expected=tag))  # type: ignore[misc]
            assert sorted(won) == [False] * (_N_THREADS - 1) + [True]
            assert bytes(blobs.read("a")) == bodies[won.index(True)].tobytes()

    def test_readers_see_the_old_content_or_the_new(self, blobs: Blobs) -> None:
        old, new = noise(300_000), noise(200_000, seed=1)
        blobs.create("a", [old])
        tag = _tag(blobs, "a")

        def act(i: int) -> bytes | None:
            if i == 0:
                assert blobs.replace("a", [new], expected=tag)
                return None
            return bytes(blobs.read("a"))

        assert set(at_once(act)) <= {None, old.tobytes(), new.tobytes()}

    # Reading.

    @pytest.mark.parametrize(
        ("start", "nbytes"), [(0, 10), (0, 1), (3, 4), (9, 1), (0, None), (4, None), (10, None), (5, 0)]
    )
    def test_ranges(self, blobs: Blobs, start: int, nbytes: int | None) -> None:
        blobs.create("a", [DIGITS])
        expected = DIGITS[start : None if nbytes is None else start + nbytes]
        assert bytes(blobs.read("a", start, nbytes)) == expected
        out = np.full(len(expected) + 2, 255, np.uint8)
        blobs.read_into("a", start, out[1:-1])
        assert out.tobytes() == b"\xff" + expected + b"\xff"

    @pytest.mark.parametrize(("start", "nbytes"), [(0, 11), (8, 5), (10, 1), (80, 5), (80, None)])
    def test_range_past_the_end_is_damage(self, blobs: Blobs, start: int, nbytes: int | None) -> None:
        blobs.create("short", [DIGITS])
        with pytest.raises(StorageError, match="short") as caught:
            blobs.read("short", start, nbytes)
        assert not isinstance(caught.value, BlobNotFoundError)
        if nbytes is not None:
            with pytest.raises(StorageError, match="short") as caught:
                blobs.read_into("short", start, np.empty(nbytes, np.uint8))
            assert not isinstance(caught.value, BlobNotFoundError)

    @pytest.mark.parametrize(("start", "nbytes"), [(0, None), (3, 4)])
    def test_missing_blob_is_told_from_other_failures(
        self, blobs: Blobs, start: int, nbytes: int | None
    ) -> None:
        blobs.create("there", [DIGITS])
        with pytest.raises(BlobNotFoundError, match="a/gone does not exist"):
            blobs.read("a/gone", start, nbytes)
        with pytest.raises(BlobNotFoundError, match="a/gone does not exist"):
            blobs.read_into("a/gone", start, np.empty(4, np.uint8))
        assert blobs.head("a/gone") is None
        blobs.delete("a/gone")  # no error

    def test_threads_read_each_its_own(self, blobs: Blobs) -> None:
        data = noise(800_000)
        blobs.create("a", [data])

        def act(i: int) -> bool:
            out = np.empty(90_000, np.uint8)
            blobs.read_into("a", i * 100_000, out)
            return np.array_equal(out, data[i * 100_000 :][:90_000]) and bytes(
                blobs.read("a", i * 100_000 + 7, 50)
            ) == bytes(data[i * 100_000 + 7 :][:50])

        assert at_once(act) == [True] * _N_THREADS

    # Looking.

    def test_head_gives_the_size(self, blobs: Blobs) -> None:
        blobs.create("a/b", [DIGITS, b"."])
        info = blobs.head("a/b")
        assert info is not None
        assert info.nbytes == 11
        assert info.tag
        assert blobs.head("a") is None

    def test_names_and_sizes_are_those_directly_below(self, blobs: Blobs) -> None:
        for n, key in enumerate(("a/2", "a/10", "a/sub/x", "ab/y", "z")):
            blobs.create(key, [DIGITS[:n]])
        assert blobs.names("a") == ["10", "2", "sub"]
        assert blobs.sizes("a") == {"2": 0, "10": 1}
        assert set(blobs.names("")) >= {"a", "ab", "z"}
        assert blobs.sizes("")["z"] == 4

    def test_nothing_is_below_what_is_not_there_or_no_folder(self, blobs: Blobs) -> None:
        blobs.create("a/2", [DIGITS])
        for prefix in ("nothing", "a/2"):
            assert blobs.names(prefix) == []
            assert blobs.sizes(prefix) == {}

    def test_deleted_blob_is_gone(self, blobs: Blobs) -> None:
        blobs.create("a/b", [DIGITS])
        blobs.delete("a/b")
        assert blobs.head("a/b") is None
        assert blobs.names("a") == []
        assert blobs.sizes("a") == {}
        with pytest.raises(BlobNotFoundError):
            blobs.read("a/b")

    def test_free_space_is_known_or_not(self, blobs: Blobs) -> None:
        free = blobs.free_nbytes()
        assert free is None or free > 0

    # Safety.

    @pytest.mark.parametrize(
        "key", ["", "/etc/passwd", "../a", "a/../../b", "a/./b", "a//b", "a/", "a\\b", "a\0b", "."]
    )
    def test_keys_that_could_leave_the_root_are_refused(self, blobs: Blobs, key: str) -> None:
        acts: list[Callable[[], object]] = [
            lambda: blobs.create(key, [DIGITS]),
            lambda: blobs.replace(key, [DIGITS], expected="x"),
            lambda: blobs.read(key),
            lambda: blobs.read(key, 3, 0),
            lambda: blobs.read_into(key, 0, np.empty(1, np.uint8)),
            lambda: blobs.head(key),
            lambda: blobs.delete(key),
        ]
        if key:
            acts += [lambda: blobs.names(key), lambda: blobs.sizes(key)]
        for act in acts:
            with pytest.raises(StorageError, match="is no key of a blob") as caught:
                act()
            assert not isinstance(caught.value, BlobNotFoundError)

    def test_files_are_what_they_say(self, blobs: Blobs) -> None:
        blobs.create("a/b", [DIGITS])
        if not are_files(blobs):
            return
        assert blobs.path("a/b").read_bytes() == DIGITS
        assert blobs.path("").is_dir()
        data, info = blobs.read_and_head("a/b")
        assert (bytes(data), info) == (DIGITS, blobs.head("a/b"))
        with os.fdopen(blobs.descriptor("a/b"), "rb") as file:
            assert file.read() == DIGITS
        with pytest.raises(BlobNotFoundError):
            blobs.read_and_head("a/c")

    def test_a_signed_url_gives_the_blob_alone(self, blobs: Blobs) -> None:
        blobs.create("a/b", [DIGITS])
        url = blobs.signed("a/b", 60)
        if url is None:
            return
        with urllib.request.urlopen(url) as reply:
            assert reply.read() == DIGITS
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(url.replace("a/b", "a/c", 1))

    def test_probe_leaves_the_storage_as_it_was(self, blobs: Blobs) -> None:
        assert probe(blobs) is not blobs.is_emulated
        assert blobs.names("_actstore/probe") == []
        assert blobs.n_retries == 0


def _tag(blobs: Blobs, key: str) -> str:
    info = blobs.head(key)
    assert info is not None
    return info.tag
