"""The process that renders chats: ``python render_process.py``. It reads and writes one JSON value a line.

A template comes with a model, from whoever made that, and Jinja's sandbox bounds neither its time nor its memory. So it
runs here, where the system bounds both. This file imports nothing of actstore.
"""

import json
import sys
from typing import Any


def _limit_memory(more_nbytes: int) -> None:
    """Let this process take so much more memory than it has now, where the system can tell."""
    try:
        import resource
        from pathlib import Path

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + more_nbytes
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        return


def _limit_seconds(more: int) -> None:
    """Let this process take so many more seconds of processor time; then the system ends it."""
    try:
        import resource
        import time

        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + 1 + more, hard))
    except (ImportError, OSError, ValueError):
        return


def main() -> None:
    """Read the template and the limits, then chats until the end; reply to each with its text, or what went wrong."""
    from transformers.utils.chat_template_utils import render_jinja_template

    given = json.loads(sys.stdin.readline())
    arguments: dict[str, Any] = given["arguments"]
    _limit_memory(given["max_memory_nbytes"])
    # Text that changes with the day cannot be made again. A string in place of the function cannot be called.
    fixed = {"strftime_now": ""} | arguments
    for line in sys.stdin:
        _limit_seconds(given["max_seconds"])
        try:
            texts, _ = render_jinja_template(
                conversations=[json.loads(line)],
                tools=given["tools"],
                chat_template=given["template"],
                add_generation_prompt=given["add_generation_prompt"],
                **fixed,
            )
            size = len(texts[0])
            reply = {"size": size} if size > given["max_size"] else {"text": texts[0]}
        except MemoryError:
            reply = {"memory": True}
        except Exception as error:  # noqa: BLE001 - a template can raise anything
            reply = {"error": f"{type(error).__name__}: {error}"[:2000]}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
