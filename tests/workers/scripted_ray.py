"""A scripted stand-in for Ray: tests can neither preempt nodes nor wait half an hour.

Calls end in the order in which they were made, except those that hang. As in Ray, all calls of a worker that dies fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Final

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from actstore.extraction.events import SegmentDone

HANGS: Final = object()
"""The outcome of a call that never returns."""
Script = Callable[[int, Any], Any]
"""A function of the number of a worker, from 0, and its call (``place``, ``start`` or a segment). It returns the
outcome: None for the usual one, an exception, or `HANGS`.
"""


def died(*, preempted: bool) -> RayActorError:
    """The error that Ray raises for all calls of a dead worker."""
    return RayActorError(error_msg="the node is gone", preempted=preempted)


def raised(cause: Exception) -> RayTaskError:
    """The error that Ray raises for one call in which a living worker raised an error."""
    return RayTaskError("run", "a traceback", cause)


@dataclass(eq=False)
class _Actor:
    number: int
    of: "ScriptedRay"
    death: Exception | None = None

    def __getattr__(self, method: str) -> Any:
        def remote(*args: Any) -> "_Call":
            call = _Call(self, args[0] if args else method)
            self.of.calls.append(call)
            return call

        return SimpleNamespace(remote=remote)


@dataclass(eq=False)
class _Call:
    actor: _Actor
    what: Any
    outcome: Any = None


@dataclass
class ScriptedRay:
    """Takes the place of the module ``ray``. Its clock advances when a wait times out."""

    script: Script
    calls: list[_Call] = field(default_factory=list)
    actors: list[_Actor] = field(default_factory=list)
    now: float = 0.0
    exceptions: Any = ray.exceptions

    def remote(self, **_options: Any) -> Any:
        def actor(_spec: Any) -> _Actor:
            self.actors.append(_Actor(len(self.actors), self))
            return self.actors[-1]

        return lambda _cls: SimpleNamespace(remote=actor)

    def wait(
        self, calls: Sequence[_Call], num_returns: int = 1, timeout: float = 0.0
    ) -> tuple[list[_Call], list[_Call]]:
        del num_returns  # always one
        for call in self.calls:
            if call in calls and self._has_ended(call):
                return [call], [other for other in calls if other is not call]
        self.now += timeout
        return [], list(calls)

    def _has_ended(self, call: _Call) -> bool:
        if call.actor.death is None and call.outcome is None:
            call.outcome = self.script(call.actor.number, call.what)
            if isinstance(call.outcome, RayActorError):
                call.actor.death = call.outcome
        return call.actor.death is not None or call.outcome is not HANGS

    def get(self, call: _Call) -> Any:
        outcome = call.outcome if call.actor.death is None else call.actor.death
        if isinstance(outcome, Exception):
            raise outcome
        usual: dict[Any, Any] = {"place": ("a host", 100 + call.actor.number), "start": None}
        return usual[call.what] if call.what in usual else SegmentDone(call.what, 1, 0, 0.0, 0.0, 0.0)

    def kill(self, actor: _Actor) -> None:
        actor.death = actor.death or ActorDiedError()

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 8.0}}]
