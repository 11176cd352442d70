"""Numbers of things, for people."""


def counted(n: int, noun: str, plural: str | None = None) -> str:
    """``1 segment``, ``2,000 segments``.

    Args:
        n: how many there are.
        noun: what they are, in the singular.
        plural: the same in the plural; None for the noun with an s.
    """
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"
