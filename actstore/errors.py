"""All errors that actstore raises on purpose, grouped by what the caller can do next.

Each message says in one or two sentences what was found, what was expected and what to do. The command line prints it
without a traceback.
"""


class ActstoreError(Exception):
    """Base of all errors raised on purpose by actstore."""

    def __str__(self) -> str:
        # KeyError would print the repr of its argument. An error is one line, whatever foreign text it contains.
        text = str(self.args[0]) if self.args else ""
        return " ".join(filter(None, map(str.strip, text.splitlines())))


class JobError(ActstoreError, ValueError):
    """The request itself is wrong: a field, an option, a combination. Change the job."""


class HookError(ActstoreError, KeyError):
    """A hook name that matches nothing, or that this architecture does not define."""


class ModelError(ActstoreError, ValueError):
    """The model or its tokenizer cannot be found, loaded, or hooked."""


class TokensError(ActstoreError, ValueError):
    """The token source cannot be read, is empty, or lacks what packing needs."""


class NoSuchTokenError(TokensError, AssertionError):
    """A text is not one token, or a token is not where it is looked for. TransformerLens raises AssertionError here."""


class StorageError(ActstoreError, OSError):
    """Reading or writing the store failed: permissions, credentials, bucket, space, damaged bytes."""


class StoreReplacedError(StorageError):
    """The store at the URL is not the one that was opened: it was replaced, removed or repaired. Open it again."""


class BusyError(StorageError):
    """A writer and a repair cannot use one store at once. Run the command again when the other one has ended."""


class UncheckedError(ActstoreError, OSError):
    """A store could not be checked, since storage does not let it be read. This is no damage."""


class PlanMismatchError(ActstoreError, ValueError):
    """The store at this URL belongs to another plan. Nothing was changed in it."""


class NotCommittedError(ActstoreError, LookupError):
    """The requested rows are part of the plan but not (yet) committed; they are absent, not zero."""


class LoaderError(ActstoreError, ValueError):
    """A loader cannot be made or resumed as requested: an option, a combination, or a state of another order."""


class ExtractError(ActstoreError, RuntimeError):
    """A segment could not be extracted. What is committed stays, and the same command continues from there."""


class IncompleteError(ExtractError):
    """A run ended without being complete, since records were removed meanwhile. The same command makes them again."""


class SetAsideError(ExtractError):
    """Some units of a run failed at every attempt and are missing; all others are done."""


class PatchError(ActstoreError, ValueError):
    """A patching experiment cannot be run as requested: prompts, metric, positions, or an option."""


class MissingExtraError(ActstoreError, ImportError):
    """An optional dependency is not installed."""
