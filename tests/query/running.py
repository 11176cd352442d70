"""A server: ``actstore serve`` in a process of its own."""

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import actstore
from actstore.query.client.served_store import ServedStore
from tests.commands import Command

_STOP_S = 60.0


class Running:
    """A server that answers."""

    def __init__(self, process: "Command | subprocess.Popen[str]", said: str, log: Path) -> None:
        self.process = process
        self.said = said
        """Its line of JSON."""
        self.url: str = json.loads(said)["url"]
        self.log = log
        """What it wrote to stderr."""

    def store(self, name: str, **options: Any) -> ServedStore:
        """One of its stores, opened as users do."""
        found = actstore.open(f"{self.url}/v1/stores/{name}", **options)
        assert isinstance(found, ServedStore)
        return found

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        import psutil

        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has just ended
                if "spawn_main" in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def stop(self) -> int:
        """End it as an operator does; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(_STOP_S)


@contextlib.contextmanager
def running(folder: Path, *arguments: str, **environment: str) -> Iterator[Running]:
    """``actstore serve`` on a free port, until the end of the block.

    Args:
        folder: for its log.
        arguments: of the command.
        environment: more of it.
    """
    log = folder / "serve.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    receiver, sender = os.pipe()
    with os.fdopen(receiver) as stdout:
        try:
            with log.open("w") as stderr:
                process = Command(
                    "serve",
                    *arguments,
                    "--port",
                    "0",
                    "--json",
                    stdout=sender,
                    stderr=stderr,
                    env=environment,
                )
        finally:
            os.close(sender)
        reader = threading.Thread(target=stdout.read, daemon=True)
        try:
            line = stdout.readline()
            assert line, f"the server did not start:\n{log.read_text()}"
            reader.start()  # the server must never wait for somebody who reads its output
            yield Running(process, line, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if reader.ident is not None:
                reader.join()
