"""The demo: from source files to a checkpoint that writes source, in minutes on two cores."""

import gzip
import json
import lzma
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from nemotron_v3.checkpoint import from_pretrained, save_pretrained
from nemotron_v3.data import (
    SEPARATOR_ID,
    Pack,
    Tokenizer,
    pack_whole,
    standard_library,
    training_packs,
)
from nemotron_v3.generation import generate
from nemotron_v3.model.cost import parameters
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.recipes.console import Story
from nemotron_v3.recipes.options import DemoOptions
from nemotron_v3.recipes.plot import plot_loss
from nemotron_v3.recipes.pretrain import (
    Optimization,
    Step,
    deferred_interrupt,
    pretrain,
    total_loss,
)
from nemotron_v3.recipes.run_folder import METRICS, whole_or_nothing

PROMPT = 'class Queue:\n    """'
SAMPLE_TOKENS = 200
# What comes after training, beside measuring the held-out files: saving, loading, the sample.
AFTERWARDS_SECONDS = 15.0
# Tokens of a pack of whole files; one that is longer is a pack of its own.
MEASURING_TOKENS = 4096


@dataclass(frozen=True)
class DemoResult:
    """Held-out bits per byte by name (the model's first), every step, and the text it wrote."""

    bits_per_byte: dict[str, float]
    steps: list[Step]
    text: str


@dataclass(frozen=True)
class Text:
    """The corpus as tokens."""

    tokenizer: Tokenizer
    train: list[list[int]]
    held_out: list[Pack]
    held_out_bytes: bytes
    bytes_per_token: float  # of the training documents


def run_demo(options: DemoOptions, story: Story | None = None) -> DemoResult:
    """Train on the standard library's source, save, reload, measure, and generate.

    Ctrl-C during training ends it after the step at hand, saves what there is beside `out`, and
    raises `KeyboardInterrupt`.

    Raises:
        ValueError: sizes that contradict each other, or an `out` that is not a run's.
    """
    options.check()
    started = time.perf_counter()
    story = story or Story()
    story.title("nemotron-v3 demo")
    torch.manual_seed(options.seed)
    model = NemotronV3ForCausalLM(options.model.config())
    with whole_or_nothing(options.out) as folder:
        text = read_text(options, story)
        tell_model(model, story)
        steps = train(model, text, options, folder, started, story)
        reloaded = reload(model, text, folder, story)
        bits_per_byte = measure(reloaded, text, folder)
        plot_loss(steps, bits_per_byte, folder / "loss.png")
        prompt = [SEPARATOR_ID, *text.tokenizer.encode(PROMPT)]
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": options.seed}
        written = generate(
            reloaded, prompt, max_new_tokens=SAMPLE_TOKENS, tokenizer=text.tokenizer, **sampling
        ).text[0]
    story.comparison(bits_per_byte)
    story.code(PROMPT, written)
    story.done(options.out, time.perf_counter() - started)
    return DemoResult(bits_per_byte, steps, written)


def read_text(options: DemoOptions, story: Story) -> Text:
    """The corpus, a tokeniser learnt from its training part, and both parts as tokens."""
    corpus = standard_library()
    train, held_out = ([d.text for d in part] for part in (corpus.train, corpus.held_out))
    size = sum(len(text.encode()) for text in train)
    held_out_bytes = "".join(held_out).encode()
    story.fact(
        "corpus",
        f"{len(train)} files of Python's standard library, {size / 1e6:.1f} MB, "
        f"{len(held_out)} held out",
    )
    tokenizer = Tokenizer.train(train, options.model.vocab_size)
    documents = tokenizer.encode_documents(train)
    bytes_per_token = size / sum(map(len, documents))
    story.fact(
        "tokeniser",
        f"byte-level BPE, {tokenizer.vocab_size} entries, {bytes_per_token:.2f} bytes a token",
    )
    packs = list(pack_whole(tokenizer.encode_documents(held_out), MEASURING_TOKENS))
    return Text(tokenizer, documents, packs, held_out_bytes, bytes_per_token)


def tell_model(model: NemotronV3ForCausalLM, story: Story) -> None:
    count = parameters(model.config)
    story.fact(
        "model",
        f"{model.config.hybrid_override_pattern}, {count.total / 1e6:.1f} M parameters, "
        f"{count.active / 1e6:.1f} M a token",
    )


def train(
    model: NemotronV3ForCausalLM,
    text: Text,
    options: DemoOptions,
    folder: Path,
    started: float,
    story: Story,
) -> list[Step]:
    """Train and save; after a Ctrl-C save and raise `KeyboardInterrupt`."""
    packs = training_packs(
        text.train, options.tokens_per_step, options.document_tokens, options.seed
    )
    optimization = Optimization(options.learning_rate, options.weight_decay)
    done = schedule(options, model, text, started)
    steps: list[Step] = []
    with (
        (folder / METRICS).open("w", encoding="utf-8") as metrics,
        story.training() as bar,
        deferred_interrupt() as interrupted,
    ):
        for step in pretrain(model, packs, optimization, text.bytes_per_token, done):
            steps.append(step)
            metrics.write(json.dumps(asdict(step)) + "\n")
            bar.show(step, done(step.step, step.seconds))
            if interrupted():
                break
        save_pretrained(model, folder)
        text.tokenizer.save(folder)
        if interrupted():
            raise KeyboardInterrupt
    return steps


def schedule(
    options: DemoOptions, model: NemotronV3ForCausalLM, text: Text, started: float
) -> Callable[[float, float], float]:
    """The fraction of the training done after (steps, seconds of training)."""
    if options.steps is not None:
        return lambda step, seconds: step / options.steps
    after = AFTERWARDS_SECONDS + measuring_seconds(model, text.held_out)
    # However little time is left, there is a step to take: a training that is over has none.
    budget = max(60 * options.minutes - (time.perf_counter() - started) - after, 1.0)
    return lambda step, seconds: seconds / budget


def measuring_seconds(model: NemotronV3ForCausalLM, packs: list[Pack]) -> float:
    """How long a forward pass over the packs takes, judged by the smallest of them."""
    smallest = min(packs, key=lambda pack: pack.layout.num_tokens)
    total_loss(model, [smallest])  # what only a first pass does is not what is measured
    start = time.perf_counter()
    total_loss(model, [smallest])
    seconds = time.perf_counter() - start
    return seconds / smallest.layout.num_tokens * sum(pack.layout.num_tokens for pack in packs)


def reload(
    model: NemotronV3ForCausalLM, text: Text, folder: Path, story: Story
) -> NemotronV3ForCausalLM:
    """The checkpoint as a new model, which must give the loss of the one that was saved."""
    reloaded = from_pretrained(folder)
    before, after = (total_loss(m, text.held_out[:1]) for m in (model, reloaded))
    if before != after:
        raise RuntimeError(f"the reloaded model's loss is {after}, the saved one's was {before}")
    targets = text.held_out[0].num_targets
    story.fact(
        "reloaded",
        f"held-out loss {after / targets:.6f}, before saving {before / targets:.6f}",
    )
    return reloaded


def measure(model: NemotronV3ForCausalLM, text: Text, folder: Path) -> dict[str, float]:
    """Bits that a byte of the held-out files costs: as the model predicts it, and compressed.

    Every token counts, the separator that ends a file too. The compressors see the same bytes as
    one stream; unlike the model they have read nothing before it.
    """
    size = len(text.held_out_bytes)
    bits_per_byte = {
        "this model": total_loss(model, text.held_out) / math.log(2) / size,
        "xz -9": 8 * len(lzma.compress(text.held_out_bytes, preset=9)) / size,
        "gzip -9": 8 * len(gzip.compress(text.held_out_bytes, compresslevel=9)) / size,
    }
    with (folder / METRICS).open("a", encoding="utf-8") as metrics:
        metrics.write(json.dumps({"held_out_bits_per_byte": bits_per_byte}) + "\n")
    return bits_per_byte
