"""Tokens that are revoked while a server of several processes runs, whatever happens to the token file."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from actstore.storage.local import LocalBlobs
from tests.query.running import running
from tests.query.server.admission.test_access import ALL, LATER, LOST, _until, ask, file_of
from tests.query.stores import WHOLE, write_all

pytestmark = pytest.mark.faults

BOUND_S: Final = 2.0
"""Seconds after which a token that was taken out of the file is no longer valid."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_all(lambda name: LocalBlobs(folder / name))
    return folder


def test_a_running_server_lets_nobody_in_for_what_its_file_said(stores: Path, tmp_path: Path) -> None:
    """This holds for every process of the server."""
    path = file_of(tmp_path, f"{ALL}\n{LATER}\n")
    (tmp_path / "new").mkdir()
    arguments = ("--root", str(stores), "--token-file", str(path), "--workers", "2")

    with running(tmp_path, *arguments) as server:

        def statuses(token: str, resource: str = f"/v1/stores/{WHOLE}") -> set[int]:
            """Statuses from several processes, as connections are shared out among them."""
            return {ask(server.url, resource, token).status for _ in range(12)}

        assert statuses(ALL) == {200}
        for how in (
            "the line is gone, and another is wrong",
            "empty",
            "gone",
            "replaced",
            "only wrong lines",
        ):
            LOST[how](path)
            changed = time.monotonic()
            _until(lambda: statuses(ALL) == {401})
            assert time.monotonic() - changed < BOUND_S + 1.0  # the requests take some time
            expected = {200} if LATER in (path.read_text() if path.exists() else "") else {401}
            assert statuses(LATER) == expected
            assert statuses(ALL, "/readyz") == ({200} if expected == {200} else {503})
            file_of(tmp_path, f"{ALL}\n{LATER}\n")
            _until(lambda: statuses(ALL) == {200})
            assert statuses(ALL, "/readyz") == {200}
        log = server.log.read_text()
        assert log.count("nobody is let in until") <= 2 * 3  # once by each process
        assert log.count("that line is passed over") <= 2
        # A process that replaces a dead one begins with the file as it is.
        LOST["the line is gone, and another is wrong"](path)
        for pid in server.workers():
            os.kill(pid, signal.SIGKILL)
        _until(lambda: _answer(lambda: statuses(LATER)) == {200})
        assert statuses(ALL) == {401}


def _answer(ask: Callable[[], set[int]]) -> set[int]:
    try:
        return ask()
    except OSError:
        return set()  # no process is there at the moment
