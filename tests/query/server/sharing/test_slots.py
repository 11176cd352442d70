"""Memory of batches is not reused while a reader has it, and is reused when none has."""

from concurrent.futures import Future

import pytest

from actstore.query.server.memory.budget import MemoryBudget
from actstore.query.server.sharing.slots import Made, Memory, Slots

NBYTES = 100


@pytest.fixture
def begun() -> list[int]:
    """Ids of the memory of each batch that was begun; all memory is kept, so that no id comes twice."""
    return []


def slots_of(budget: MemoryBudget, n_kept: int, memories: list[Memory]) -> Slots:
    account = budget.account("an order")
    account.grow(NBYTES)

    def new_memory() -> Memory:
        memories.append({})
        return memories[-1]

    return Slots(budget, account, NBYTES, n_kept, new_memory)


def test_what_is_being_sent_is_not_written_over(begun: list[int]) -> None:
    """A client is slow to take one batch, while the others are not kept any more."""
    budget, memories = MemoryBudget(100 * NBYTES), list[Memory]()
    slots = slots_of(budget, 1, memories)

    def begin(memory: Memory) -> "Future[Made]":
        begun.append(id(memory))
        made: Future[Made] = Future()
        made.set_result({})
        return made

    slow, is_shared = slots.lease((0, 0), "slow", begin)
    assert not is_shared
    for k in range(1, 6):
        quick, _ = slots.lease((0, k), "quick", begin)
        del quick
    assert (0, 0) not in slots
    assert begun[0] not in begun[1:]
    assert len(memories) == 2
    assert budget.held == 2 * NBYTES
    del slow
    assert budget.held == NBYTES  # once the batch was taken, others have the memory


def test_a_batch_that_two_wait_for_is_made_once(begun: list[int]) -> None:
    budget = MemoryBudget(100 * NBYTES)
    slots = slots_of(budget, 2, [])
    made: Future[Made] = Future()

    def begin(memory: Memory) -> "Future[Made]":
        begun.append(id(memory))
        return made

    leases = [slots.lease((0, 0), client, begin) for client in ("one", "two", "two")]
    assert [is_shared for _, is_shared in leases] == [False, True, True]
    assert all(lease.made is made for lease, _ in leases)
    assert len(begun) == 1
