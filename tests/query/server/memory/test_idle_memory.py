"""A server gives back memory that is not used any more."""

import threading

import pytest

from actstore.query.problem import Problem
from actstore.query.server.memory.budget import Account, MemoryBudget


def spare(budget: MemoryBudget, nbytes: int) -> tuple[Account, threading.Event]:
    """An unused account that can be given up, and the event that is set when it is."""
    given_up = threading.Event()

    def give_up() -> None:
        account.close()
        given_up.set()

    account = budget.account("somebody", give_up)
    account.grow(nbytes, nbytes)
    account.leave()
    return account, given_up


def test_what_is_idle_is_given_up() -> None:
    budget = MemoryBudget(100)
    _, given_up = spare(budget, 40)
    budget.give_up_idle(3600.0)
    assert budget.held == 40
    budget.give_up_idle(0.0)
    assert given_up.wait(30)
    assert budget.held == 0


def test_what_is_in_use_stays() -> None:
    budget = MemoryBudget(100)
    account, given_up = spare(budget, 40)
    assert account.use("another")
    budget.give_up_idle(0.0)
    assert not given_up.is_set()
    assert budget.held == 40
    account.leave()
    budget.give_up_idle(0.0)
    assert given_up.wait(30)
    assert not account.use("another")


def test_nothing_is_given_up_twice() -> None:
    budget = MemoryBudget(100)
    _, given_up = spare(budget, 40)
    budget.give_up_idle(0.0)
    assert given_up.wait(30)
    budget.give_up_idle(0.0)
    held = budget.hold("somebody", 50)
    assert budget.held == 50
    with pytest.raises(Problem, match="may have 50"):
        budget.hold("somebody", 1)
    held.close()
    assert budget.held == 0
