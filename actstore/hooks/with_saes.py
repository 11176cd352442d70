"""The part of a hooked model that runs with sparse autoencoders in place of values, with SAELens' names."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from actstore.errors import HookError
from actstore.hooks.attached_sae import AttachedSae, Autoencoder, several
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.with_functions import WithFunctions


class WithSaes(WithFunctions):
    """SAEs and transcoders of SAELens, or any objects like them (`actstore.hooks.attached_sae.Autoencoder`).

    While an SAE is attached, its hooks exist under the name of the hook that it replaces, such as
    ``blocks.2.hook_resid_post.hook_sae_acts_post``: they are in caches, and functions may be on them.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, prepend_bos: bool | None = None) -> None:
        """Wrap a model without running it; arguments are those of `actstore.HookedModel`."""
        super().__init__(model, tokenizer, prepend_bos=prepend_bos)
        self._names_without_saes = self.names
        self._attached: dict[str, AttachedSae] = {}

    @property
    def acts_to_saes(self) -> dict[str, Autoencoder]:
        """The SAEs that are attached, by the names of their hooks as they spell them."""
        return {attached.given_name: attached.sae for attached in self._attached.values()}

    def add_sae(self, sae: Autoencoder, use_error_term: bool | None = None) -> None:
        """Attach an SAE until `reset_saes`, in place of one that reads the same hook.

        Args:
            sae: the SAE; its configuration names the hook.
            use_error_term: add what it does not reconstruct, so that the model computes as without it, unless a
                function changes features; None for the setting of the SAE.

        Raises:
            HookError: the model does not have the hook, or another SAE writes to it.
        """
        attached = AttachedSae(sae, self._names_without_saes, use_error_term=use_error_term)
        others = [other for reads, other in self._attached.items() if reads != attached.reads]
        if any({attached.reads, attached.writes} & {other.reads, other.writes} for other in others):
            raise HookError(f"another SAE is at {attached.writes} already; call reset_saes() first")
        self._attach(self._attached | {attached.reads: attached})

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take SAEs away.

        Args:
            act_names: names of the hooks that they read; None for all SAEs.
        """
        if act_names is None:
            self._attach({})
            return
        names = [act_names] if isinstance(act_names, str) else act_names
        gone = {self._names_without_saes.one(name) for name in names}
        self._attach({reads: attached for reads, attached in self._attached.items() if reads not in gone})

    @contextmanager
    def saes(
        self,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
    ) -> Iterator[Self]:
        """A context with SAEs attached; at its end, those that were there before are there again.

        Args:
            saes: one SAE, or several.
            reset_saes_end: False to leave them attached.
            use_error_term: see `add_sae`.
        """
        before = dict(self._attached)
        try:
            for sae in several(saes):
                self.add_sae(sae, use_error_term)
            yield self
        finally:
            if reset_saes_end:
                self._attach(before)

    def run_with_saes(
        self,
        *args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the model with SAEs: `saes` for this one call. Other arguments are those of a call of the model."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self(*args, **kwargs)

    def run_with_cache_with_saes(
        self,
        *args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ActivationCache]:
        """`saes` for one call of `run_with_cache`, which has the other arguments. The cache holds hooks of the SAEs."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self,
        *args: Any,
        saes: Autoencoder | Sequence[Autoencoder] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """`saes` for one call of `run_with_hooks`, which has the other arguments."""
        with self.saes(saes, reset_saes_end, use_error_term):
            return self.run_with_hooks(*args, **kwargs)

    def _attach(self, attached: dict[str, AttachedSae]) -> None:
        """Attach these SAEs and no others."""
        inner = {sae.writes: sae.leaves for sae in attached.values()}
        places = {place: sae for sae in attached.values() for place in (sae.reads, sae.writes)}
        self.names = self._names_without_saes.extended(inner)
        self._functions.insert(places, self.names)
        self._attached = attached

    @abstractmethod
    def run_with_cache(self, *args: Any, **kwargs: Any) -> tuple[Any, ActivationCache]: ...

    @abstractmethod
    def run_with_hooks(self, *args: Any, **kwargs: Any) -> Any: ...
