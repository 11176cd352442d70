"""A script of `test_quantised.py` for a package that quantises: hooks and weights of a quantised Llama model.

    python quantised.py FOLDER torchao|bitsandbytes SAVED

Prints one JSON object.
"""

import json
import sys
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from actstore.errors import ModelError
from actstore.extraction.fingerprint import fingerprint
from actstore.hooks.model import HookedModel

TOKENS = torch.arange(5, 29).view(2, 12)
VIEWS = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out", "b_Q", "b_out", "W_U", "W_E")


def quantised(folder: str, package: str) -> Any:
    if package == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        device_map="cpu",
    )


def outcome(call: Any) -> str:
    try:
        call()
    except ModelError as error:
        return str(error)
    return "there"


def main(folder: str, package: str, saved: str) -> None:
    warnings.simplefilter("ignore")
    model = quantised(folder, package).eval()
    kinds = {type(parameter.data).__name__ for parameter in model.parameters()}
    kinds |= {type(parameter).__name__ for parameter in model.parameters()}
    hooked = HookedModel(model)
    passed: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _module, _args, output, index=index: passed.update({f"q{index}": output})
        )
    with torch.no_grad():
        plain = model(TOKENS, output_hidden_states=True, use_cache=False)
    logits, cache = hooked.run_with_cache(TOKENS)
    states = plain.hidden_states[: hooked.cfg.n_layers]
    are_equal = [torch.equal(cache["resid_pre", layer], state) for layer, state in enumerate(states)]
    are_equal += [torch.equal(cache[name].flatten(2), value) for name, value in passed.items()]
    views = {view: outcome(lambda view=view: getattr(hooked, view)) for view in VIEWS}
    views["hook_result"] = outcome(
        lambda: hooked.run_with_cache(TOKENS, names_filter="blocks.1.attn.hook_result")
    )
    model.save_pretrained(saved)
    again = HookedModel.from_pretrained(saved, device="cpu")
    result = {
        "kinds": sorted(kinds),
        "is_equal": all(are_equal) and torch.equal(logits, plain.logits),
        "views": views,
        "again": torch.equal(again(TOKENS), logits),
        "fingerprints": [fingerprint(folder, None), fingerprint(saved, None)],
    }
    print(json.dumps(result))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
