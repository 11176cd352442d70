"""The part of a hooked model that generates text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from actstore.errors import ModelError, TokensError
from actstore.hooks.cache.activation_cache import ActivationCache
from actstore.hooks.capture.functions import NameFilter, selected
from actstore.hooks.capture.keeping import in_forward_order
from actstore.hooks.generation.choosing import Choosing
from actstore.hooks.generation.generate import generated
from actstore.hooks.generation.steps import Steps
from actstore.hooks.loading.device import usable_device
from actstore.hooks.messages.quoted import quoted
from actstore.hooks.with_calls import WithCalls

if TYPE_CHECKING:
    import torch


class GeneratingModel(WithCalls):
    """A model with TransformerLens' method `generate`."""

    def generate(
        self,
        input: "str | Sequence[str] | torch.Tensor" = "",  # noqa: A002 - TransformerLens' name
        max_new_tokens: int = 10,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        do_sample: bool = True,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float = 1.0,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        use_past_kv_cache: bool = True,
        prepend_bos: bool | None = None,
        padding_side: Literal["left"] | None = None,
        return_type: Literal["input", "str", "tokens", "tensor"] = "input",
        verbose: bool = True,
        *,
        attention_mask: "torch.Tensor | None" = None,
        return_cache: bool = False,
        names_filter: NameFilter | None = None,
        device: "str | torch.device | None" = None,
        output_logits: bool = False,
        stop_strings: str | Sequence[str] | None = None,
    ) -> Any:
        """Generate tokens after a prompt, with the functions on hooks called at every step.

        This is Hugging Face's generation, with these settings and none that come with the model. Functions see the
        whole prompt in the first step [batch, position, ...] and a single token in each later one [batch, 1, ...];
        patterns and scores are those of its query against all positions so far [batch, head, 1, source_position].
        Without ``use_past_kv_cache`` every step has all positions so far.

        Args:
            input: text, texts, or ids [batch, position].
            max_new_tokens: most tokens to generate.
            stop_at_eos: end a row with an EOS token, and fill it up with EOS while others go on.
            eos_token_id: the EOS token, or several; None for that of the tokenizer.
            do_sample: sample; otherwise take the most probable token.
            top_k: sample from so many tokens only; None for all.
            top_p: sample from the most probable tokens that have this probability together; None for all.
            temperature: what logits are divided by before they are sampled from; 0 is greedy.
            freq_penalty: what is subtracted from the divided logit for each time that its token is there, in sampling.
            repetition_penalty: what positive logits of tokens that are there are divided by, and negative multiplied.
            use_past_kv_cache: keep keys and values from step to step; without effect for families that are not in the
                table.
            prepend_bos: begin text with the BOS token; None for the default of this model.
            padding_side: shorter texts are always padded on the left; ``left`` masks pad tokens in front of ids.
            return_type: ``str`` for text, ``tokens`` or ``tensor`` for ids [batch, position]; ``input`` for whichever
                was given. The prompt is in it. Without effect for ``output_logits``.
            verbose: without effect.
            attention_mask: [batch, position] for ids that are padded on the left, 0 at padding.
            return_cache: give the values of hooks as well, of prompt and new tokens.
            names_filter: which hooks, as in `HookedModel.run_with_cache`; naming some sets ``return_cache``.
            device: where these values are kept; None for the device of the model.
            output_logits: give Hugging Face's output, with ids as ``sequences``, and ``logits``: those that each new
                token was chosen from, before any setting changes them, float32 [batch, d_vocab] a step.
            stop_strings: end a row with the token that completes one of these texts, which stays in it. Rows that have
                ended are filled up with EOS; without ``stop_at_eos`` they go on until all have.

        Returns:
            The output, or (output, cache). Values of a cache are those that the steps had, edits included; only the
            last token is run for it alone. At positions after the end of a row they mean nothing.

        Raises:
            HookError: a name matches nothing.
            ModelError: the model was loaded without its head.
            TokensError: a setting is out of its range, the rows would be longer than the model is made for, padding is
                on the right, there is no EOS token, or no tokenizer to find texts with.
        """
        import torch

        del verbose
        if not self.has_head:
            raise ModelError("this model was loaded without its head, so it cannot generate")
        if return_type not in ("input", "str", "tokens", "tensor"):
            raise TokensError(
                f"return_type is {quoted(return_type)}; choose 'input', 'str', 'tokens' or 'tensor'"
            )
        if padding_side not in ("left", None):
            raise TokensError(
                f"padding_side is {quoted(padding_side)}; new tokens follow the last one of each row, so choose 'left'"
            )
        is_tokens = isinstance(input, torch.Tensor) or (
            isinstance(input, list) and bool(input) and not isinstance(input[0], str)
        )
        ids, mask = self._input(input, prepend_bos, padding_side if is_tokens else "left", attention_mask)
        if mask is not None and not bool(mask[:, -1].all()):
            raise TokensError(
                "new tokens follow the last position, and a row has padding there; pad on the left"
            )
        choosing = Choosing(
            max_new_tokens,
            do_sample,
            temperature,
            top_k,
            top_p,
            freq_penalty,
            repetition_penalty,
            self._eos(eos_token_id) if stop_at_eos else (),
            [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ()),
        )
        length, limit = ids.shape[1] + max_new_tokens, self.cfg.n_ctx
        if limit is not None and length > limit:
            raise TokensError(
                f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones are more than the {limit} that this "
                "model is made for; shorten one of them"
            )
        has_cache = return_cache or names_filter is not None
        wanted = selected(self.names, "*" if names_filter is None else names_filter) if has_cache else ()
        steps = Steps(self._functions, wanted, None if device is None else usable_device(device))
        generation, values = generated(
            self._inner,
            self._forward,
            steps,
            ids=ids,
            mask=torch.ones_like(ids) if mask is None else mask,
            choosing=choosing,
            tokenizer=self.tokenizer if choosing.stop_strings else None,
            # Other families keep other things than keys, and not all of them rightly.
            use_cache=use_past_kv_cache and self.architecture.attention is not None,
            has_logits=output_logits,
            has_values=has_cache,
        )
        output: Any = generation
        if not output_logits:
            is_text = return_type == "str" or (return_type == "input" and not is_tokens)
            output = generation.sequences
            if is_text:
                output = self._as_text(output, is_one=isinstance(input, str) or is_tokens)
        if not has_cache:
            return output
        self._check_reached(set(wanted) - values.keys())
        cache = ActivationCache(
            in_forward_order(values, self.names), self, kind="activations", edited=self._functions.names
        )
        return output, cache

    def _as_text(self, ids: "torch.Tensor", *, is_one: bool) -> str | list[str]:
        """The text of rows without special tokens; that of one row alone, if there is one and it was given alone."""
        decode = self.tokenizer.decode
        texts = [
            decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False) for row in ids.tolist()
        ]
        return texts[0] if is_one and len(texts) == 1 else texts

    def _eos(self, given: int | Sequence[int] | None) -> Sequence[int]:
        if given is None and self._prompts is not None:
            given = self.tokenizer.eos_token_id
        if given is None:
            raise TokensError("no EOS token is known; give eos_token_id, or stop_at_eos=False")
        return [given] if isinstance(given, int) else list(given)
