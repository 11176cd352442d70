"""Running ``actstore`` and examples in Python in separate processes that have the libraries loaded already.

A new interpreter takes three seconds to import torch, and six for transformers. Here a server process of
multiprocessing has imported them, and is forked for each command. Tests of imports, of their memory, or of the
executable itself start it as users do.
"""

import contextlib
import io
import multiprocessing
import multiprocessing.reduction
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any, Final

import pytest

FORKS: Final = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preload"])


def start_server() -> None:
    """Start the process that is forked. It keeps the environment in which it starts; torch reads the number of threads
    when it is imported.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


class Command:
    """A command that has been started, with the methods of `subprocess.Popen` that tests need."""

    def __init__(
        self,
        *arguments: str,
        stdout: IO[str] | int,
        stderr: IO[str] | int,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        code: str | None = None,
        stdin: IO[str] | int | None = None,
    ) -> None:
        """Start ``actstore`` with these arguments, or Python.

        Args:
            arguments: the arguments of the command, without its name.
            stdout: the file or descriptor that it writes its output to.
            stderr: the file or descriptor that it writes errors to.
            env: its whole environment; by default that of this process.
            cwd: its working directory; by default that of this process.
            code: Python code to run instead of the command, with these arguments.
            stdin: the file or descriptor that it reads; by default there is nothing to read.
        """
        self.arguments = arguments
        start_server()
        reads = _Descriptor(stdin) if stdin is not None else None
        self._process = FORKS.Process(
            target=_run,
            args=(
                arguments,
                code,
                (reads, _Descriptor(stdout), _Descriptor(stderr)),
                dict(os.environ if env is None else env),
                str(Path.cwd() if cwd is None else cwd),
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it ends, and return its exit code.

        Raises:
            subprocess.TimeoutExpired: it runs for longer than this number of seconds.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(list(self.arguments), timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Conversation(Command):
    """Python code in a process of its own that reads lines and answers in lines; its errors are those of this
    process.
    """

    def __init__(self, *arguments: str, code: str) -> None:
        """Start it.

        Args:
            arguments: its arguments.
            code: the code, which must flush what it prints.
        """
        (reads, says), (hears, writes) = os.pipe(), os.pipe()
        self._says, self._hears = os.fdopen(says, "w"), os.fdopen(hears)
        try:
            super().__init__(*arguments, stdin=reads, stdout=writes, stderr=2, code=code)
        finally:
            os.close(reads)
            os.close(writes)

    def say(self, line: str) -> None:
        """Write a line for it to read."""
        self._says.write(f"{line}\n")
        self._says.flush()

    def answer(self) -> str:
        """The next line that it prints, without its end; empty once it has ended."""
        return self._hears.readline().rstrip("\n")

    def end(self) -> None:
        """Kill it, unless it has ended, and close what lies between it and this process."""
        self.kill()
        self.wait()
        self._says.close()
        self._hears.close()


def command(
    *arguments: str,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    code: str | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Run ``actstore`` with these arguments, or Python code, to its end; the result has its output.

    Raises:
        subprocess.TimeoutExpired: it runs for longer than this number of seconds, and is killed.
    """
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = Command(*arguments, stdout=stdout, stderr=stderr, env=env, cwd=cwd, code=code)
        try:
            ended = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(arguments, ended, *texts)


def command_here(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command in this process; the result has its output."""
    from actstore.cli.main import run

    handler = signal.getsignal(signal.SIGTERM)
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run(list(arguments))
    finally:
        signal.signal(signal.SIGTERM, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


class _Descriptor:
    """A file descriptor of which the started process gets a copy."""

    def __init__(self, file: IO[str] | int) -> None:
        self._descriptor = file if isinstance(file, int) else file.fileno()

    def __reduce__(self) -> tuple[object, ...]:
        return _detach, (multiprocessing.reduction.DupFd(self._descriptor),)


def _detach(descriptor: Any) -> int:
    """Return the descriptor itself, once it has been unpickled."""
    return int(descriptor.detach())


def _run(
    arguments: tuple[str, ...],
    code: str | None,
    files: tuple[int | None, int, int],
    env: dict[str, str],
    cwd: str,
) -> None:
    """Run the command or the code in the forked process."""
    for standard, descriptor in enumerate(files):
        os.dup2(os.open(os.devnull, os.O_RDONLY) if descriptor is None else descriptor, standard)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if code is not None:
        sys.argv = ["-c", *arguments]
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = ["actstore", *arguments]
    from actstore.cli.main import main

    main()
