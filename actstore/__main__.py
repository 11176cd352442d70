"""``python -m actstore``: the ``actstore`` command, also where its script is not on the path."""

from actstore.cli.main import main

if __name__ == "__main__":
    main()
