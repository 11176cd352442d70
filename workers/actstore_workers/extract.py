"""``python -m actstore_workers.extract JOB.yaml [options]``: ``actstore extract`` with the ray executor.

It is the entry point of a Ray job. It joins the cluster that it runs in, and starts one on a single machine.
"""

import os
import sys

from actstore.cli.main import run


def main(args: list[str]) -> int:
    """Run ``actstore extract`` and return its exit code (75: terminated, run it again)."""
    given = ["extract", "--executor", "ray", *args]
    # Ray sets RAY_ADDRESS for the entry point of a job.
    if "--ray-address" not in args and os.environ.get("RAY_ADDRESS"):
        given += ["--ray-address", os.environ["RAY_ADDRESS"]]
    return run(given)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
