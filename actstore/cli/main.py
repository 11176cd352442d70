"""The ``actstore`` program: runs a command, and reports every error as one sentence and an exit code."""

import signal
import sys
from importlib import import_module
from types import FrameType

import click

from actstore._version import __version__
from actstore.cli.readers import may_leave
from actstore.errors import ActstoreError, BusyError, IncompleteError, SetAsideError
from actstore.reason import reason

RESUMABLE = 75
"""Exit code (``EX_TEMPFAIL``) of a run that SIGTERM ended, that is not complete, or whose store another process is
writing to. Running the same command again continues it.
"""
SET_ASIDE = 3
"""Exit code of a run of which all is done but some segments, which failed at every attempt."""

_COMMANDS = {
    "dashboard": "Write pages and tables of what features of HOOK in the store at URL are active on.",
    "demo": "Extract from a bundled model, read the store, and draw a picture.",
    "evaluate-sae": "Measure SAEs on the rows of the store at URL: explained variance, L0, dead features and more.",
    "export": "Write HOOK of the store at URL to a new FOLDER, in the form of another library.",
    "extract": "Write the activations of a model over a text to a store.",
    "find": "Print where TEXT is in the store at URL: sequence, position, and the text around it.",
    "import": "Write the activations in FOLDER, which another library cached, to a store.",
    "generate": "Sample continuations of prompts, and write them with their tokens to a file.",
    "info": "Say what the store at URL holds, and how much of it is committed.",
    "patch": "Patch a grid for each of many pairs of prompts, and store the metric of every cell.",
    "pca": "Find the principal components of hooks of the store at URL, and draw rows along them.",
    "plan": "Say what an extraction would write, without writing it.",
    "probe": "Fit a linear probe for each of some hooks of the store at URL, and measure it on held-out documents.",
    "serve": "Serve the stores at URLs, and all stores below --root, over HTTP.",
    "slice": "Print activations of HOOK in the store at URL, or save them.",
    "stats": "Print statistics of HOOKS in the store at URL, or of all its hooks.",
    "top": "Print the rows with the largest values of each feature in the store at URL, with the text around them.",
    "train-sae": "Train a sparse autoencoder on HOOK of the store at URL, for SAELens.",
    "verify": "Check every byte of the store at URL, and repair what is damaged with --repair.",
}
"""The first sentence of what each command says of itself, here so that ``--help`` imports none of them."""
_MODULES = {"import": "import_cache"}
"""Modules of the commands whose name cannot be the name of a module."""
_ANALYSES = ("dashboard", "evaluate-sae", "pca", "probe", "stats", "top")
"""Commands whose modules are in `actstore.cli.analysing`; the others are in `actstore.cli.commands`."""


class _Terminated(BaseException):
    """Raised at SIGTERM. Like KeyboardInterrupt, it is not caught by accident."""


class LazyGroup(click.Group):
    """Imports the module of a command only when the command is run, so that ``--help`` is fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        name = _MODULES.get(cmd_name, cmd_name.replace("-", "_"))
        room = "analysing" if cmd_name in _ANALYSES else "commands"
        command = getattr(import_module(f"actstore.cli.{room}.{name}"), f"{name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="actstore")
def cli() -> None:
    """Cache the activations of language models once, and read them everywhere.

    Errors are one sentence; add --debug to any command to see where one comes from.
    """


def main() -> None:
    """Entry point of the ``actstore`` command."""
    sys.exit(run(sys.argv[1:]))


def run(args: list[str]) -> int:
    """Run one command line and return its exit code.

    The code is 0 on success; 1 after an error, which is printed in one sentence; 2 for wrong usage; 3 if some segments
    failed at every attempt and all others are done; 75 if the run was
    terminated, is not complete or must wait for another process, and 130 if it was interrupted: run it again.
    """
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        with may_leave():
            # Without standalone mode, click returns the code of an Exit, otherwise the command's result, which is None.
            code = cli.main(args=args, prog_name="actstore", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo(
            "interrupted; what is committed stays, and the same command continues from there", err=True
        )
        return 130
    except _Terminated:
        click.echo("terminated; what is committed stays, and the same command continues from there", err=True)
        return RESUMABLE
    except ActstoreError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        if isinstance(error, SetAsideError):
            return SET_ASIDE
        return RESUMABLE if isinstance(error, BusyError | IncompleteError) else 1
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"internal error: {type(error).__name__}: {reason(error)} (this is a bug; --debug shows where)",
            err=True,
        )
        return 1


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise _Terminated
