"""A process that has imported the libraries of others, and is forked for each run of pytest: that saves much time.

It is run as a script, and imports nothing of the repository, so that each fork imports what is in the copy then.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """The libraries are named on the command line. For each line of JSON, arguments of pytest and a file for what it
    prints: a line with the process that runs them, and one with its exit code once it has ended.
    """
    del sys.path[0]  # of this script
    import pytest

    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        asked = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()  # so that what the tests start can be ended with them
            printed = os.open(asked["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(printed, descriptor)
            code = 3  # as pytest has it for errors of its own
            try:
                code = int(pytest.main(asked["arguments"]))
            finally:
                sys.stdout.flush()
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
