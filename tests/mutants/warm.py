"""A process that has imported the libraries, and is forked for each run of pytest, which saves much time.

It is run as a script, and imports nothing of the repository, so that each fork imports what is in the copy at that
time.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """Import the libraries that the command line names, then run pytest once for each line of JSON from stdin.

    A line holds the arguments of pytest and the file for its output. The replies are a line with the id of the process
    that runs it, and a line with its exit code once it has ended.
    """
    del sys.path[0]  # the folder of this script
    import pytest

    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os.setsid()  # so that processes that the tests start can be ended with them
            printed = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(printed, descriptor)
            code = 3  # the code that pytest uses for its own errors
            try:
                code = int(pytest.main(request["arguments"]))
            finally:
                sys.stdout.flush()
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
