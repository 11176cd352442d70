"""Checking that SAELens is installed."""

from importlib.util import find_spec

from actstore.errors import MissingExtraError


def check_installed(package: str = "sae_lens") -> None:
    """Check that a package can be imported.

    Raises:
        MissingExtraError: it is not installed.
    """
    if find_spec(package) is None:
        raise MissingExtraError(
            f"the package {package} is not installed, and it is needed here; run pip install 'actstore[saelens]'"
        )
