"""Memory that the body of a reply takes while it is sent."""

from collections.abc import Iterator
from dataclasses import dataclass

from actstore.query.server.sending.body import Body, InMemory


@dataclass
class _Part:
    kept_nbytes: int
    held_nbytes: int
    nbytes: int = 1
    is_ready: bool = True

    def pieces(self, start: int, stop: int) -> Iterator[memoryview]:
        yield memoryview(b"x")[start:stop]


def test_what_is_kept_adds_up_and_of_what_is_read_the_largest_counts() -> None:
    assert Body([InMemory(bytes(100)), _Part(64, 7), _Part(32, 9)]).held_nbytes == 100 + 64 + 32 + 9
    assert Body([]).held_nbytes == 0
