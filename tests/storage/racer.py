"""One of several processes that do the same thing at the same moment; started by `tests.storage.race`.

For each line it reads, it does what that says to the storage at the URL of its first argument: ``create KEY``,
``replace KEY TAG`` or ``probe``. It answers with one line: ``True`` or ``False``, or the error.
"""

import sys

from actstore.storage.opening import open_blobs
from actstore.storage.probing import probe


def main(url: str, name: str) -> None:
    blobs = open_blobs(url)
    body = [name.encode() * 100_000, b"."]  # long enough that two writers would overlap
    print("ready", flush=True)  # noqa: T201
    for line in sys.stdin:
        try:
            match line.split():
                case ["create", key]:
                    answer = blobs.create(key, body)
                case ["replace", key, tag]:
                    answer = blobs.replace(key, [*body, tag.encode()], expected=tag)
                case _:
                    answer = probe(blobs)
        except Exception as error:  # noqa: BLE001 - the test wants to see it
            print(f"{type(error).__name__}: {error}", flush=True)  # noqa: T201
        else:
            print(answer, flush=True)  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
