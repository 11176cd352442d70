"""Every error that actstore raises on purpose, grouped by what the caller can do next.

The text of each says what was found, what was expected and what to do, in one sentence or two; the command
line prints it without a traceback.
"""


class ActstoreError(Exception):
    """Base of all errors raised on purpose by actstore."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument. Whatever foreign text is in it, an error is one line.
        text = str(self.args[0]) if self.args else ""
        return " ".join(filter(None, map(str.strip, text.splitlines())))


class JobError(ActstoreError, ValueError):
    """The request itself is wrong: a field, an option, a combination. Change the job."""


class HookError(ActstoreError, KeyError):
    """A hook name that nothing matches, or that this architecture does not define."""


class ModelError(ActstoreError, ValueError):
    """The model or its tokenizer cannot be found, loaded, or hooked."""


class TokensError(ActstoreError, ValueError):
    """The token source cannot be read, is empty, or lacks what packing needs."""


class StorageError(ActstoreError, OSError):
    """Reading or writing the store failed: permissions, credentials, bucket, space, damaged bytes."""


class StoreReplacedError(StorageError):
    """What is at the URL is not the store that was opened, but replaced, removed or repaired. Open it again."""


class BusyError(StorageError):
    """A writer and a repair cannot be at one store together. Run the same command again when the other has ended."""


class UncheckedError(ActstoreError, OSError):
    """A check of a store could not be made: storage does not let it be read. That is no damage."""


class PlanMismatchError(ActstoreError, ValueError):
    """The store at this URL belongs to another plan. Nothing was changed in it."""


class NotCommittedError(ActstoreError, LookupError):
    """The rows asked for are part of the plan but not (yet) committed; they are absent, not zero."""


class LoaderError(ActstoreError, ValueError):
    """A loader cannot be made or resumed as asked for: an option, a combination, a state of another order."""


class ExtractError(ActstoreError, RuntimeError):
    """A segment could not be extracted. What is committed stays; the same command goes on from there."""


class IncompleteError(ExtractError):
    """A run came to its end and is not complete, since records were removed meanwhile. The same command makes them."""


class MissingExtraError(ActstoreError, ImportError):
    """An optional dependency is not installed."""
