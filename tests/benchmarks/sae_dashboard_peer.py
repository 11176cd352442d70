"""SAEDashboard on the features and tokens of the benchmark, in a process of its own.

``python -m tests.benchmarks.sae_dashboard_peer MODEL SAE TOKENS.npy HOOK N_FEATURES N N ...`` prints the seconds of a
dashboard of so many of the sequences each, as JSON.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Final

_FOLDER: Final = Path(__file__).parents[2] / ".cache" / "sae-dashboard-0.8.0"
_WITHOUT_DEPENDENCIES: Final = (
    # It asks for old releases of what is here already (TransformerLens 2, NumPy 1), and does not need them.
    "sae-dashboard==0.8.0",
    "dataclasses-json==0.6.7",
    "marshmallow==3.26.2",
    "typing-inspect==0.9.0",
    "mypy-extensions==1.2.0",
    "eindex-callum==0.1.2",
    "decode-clt==0.0.1",
)


def seconds_of(
    model: Path, sae: Path, tokens: Path, hook: str, n_features: int, sizes: tuple[int, ...]
) -> dict[int, float]:
    """Seconds of a dashboard of so many features over the first sequences, by their number.

    Args:
        model: folder of a model of the Llama family.
        sae: folder of an SAE of SAELens.
        tokens: file of token ids [n_sequences, n_positions], ``.npy``.
        hook: name of the hook.
        n_features: number of features, from 0.
        sizes: numbers of sequences.
    """
    if not _FOLDER.exists():
        _FOLDER.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_FOLDER.parent) as name:
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", f"{name}/all"]
            subprocess.run([*pip, *_WITHOUT_DEPENDENCIES], check=True, stdout=subprocess.DEVNULL)
            os.rename(f"{name}/all", _FOLDER)  # noqa: PTH104 - complete or not at all
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.sae_dashboard_peer"]
    numbers = map(str, (n_features, *sizes))
    done = subprocess.run(
        [*command, str(model), str(sae), str(tokens), hook, *numbers],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": f"{_FOLDER}:{Path(__file__).parents[2]}"},
    )
    seconds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return {int(size): value for size, value in seconds.items()}


def _hooked(folder: str) -> Any:
    """The model as SAEDashboard takes it; TransformerLens does not know this one by name."""
    import torch
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    of = hf.config
    cfg = HookedTransformerConfig(
        model_name="smollm2",
        d_model=of.hidden_size,
        d_head=of.head_dim,
        n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads,
        d_mlp=of.intermediate_size,
        n_layers=of.num_hidden_layers,
        n_ctx=128,
        eps=of.rms_norm_eps,
        d_vocab=of.vocab_size,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=of.head_dim,
        rotary_base=int(of.rope_parameters["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        dtype=torch.float32,
        device="cpu",
    )
    model = HookedSAETransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    processing = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    model.load_and_process_state_dict(convert_llama_weights(hf, cfg), **dict.fromkeys(processing, False))
    ids = torch.arange(2, 66)[None]
    with torch.no_grad():
        assert (model(ids) - hf(ids).logits).abs().max() < 0.05
    return model


def main(folder: str, sae_folder: str, tokens_file: str, hook: str, *numbers: str) -> None:
    """Measure, and print."""
    import numpy as np
    import torch
    from sae_dashboard.data_writing_fns import save_feature_centric_vis  # type: ignore[import-not-found]
    from sae_dashboard.sae_vis_data import SaeVisConfig  # type: ignore[import-not-found]
    from sae_dashboard.sae_vis_runner import SaeVisRunner  # type: ignore[import-not-found]
    from sae_lens import SAE

    model = _hooked(folder)
    tokens = torch.from_numpy(np.load(tokens_file)).long()
    n_features, *sizes = map(int, numbers)
    seconds = {}
    with tempfile.TemporaryDirectory() as name:
        for size in sizes:
            sae = SAE.load_from_disk(sae_folder)  # a run changes its SAE
            started = time.perf_counter()
            config = SaeVisConfig(hook_point=hook, features=list(range(n_features)))
            data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens[:size])
            save_feature_centric_vis(data, filename=f"{name}/{size}.html")
            seconds[size] = time.perf_counter() - started
    print(json.dumps(seconds))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
