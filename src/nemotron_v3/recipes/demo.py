"""The demo: from source files to a checkpoint that writes source, in minutes on two cores."""

import gzip
import json
import lzma
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from nemotron_v3.checkpoint import from_pretrained
from nemotron_v3.data import (
    SEPARATOR_ID,
    DataOptions,
    DataReport,
    Pack,
    PackedRow,
    Source,
    Tokenizer,
    pack_whole,
    standard_library,
    training_packs,
)
from nemotron_v3.generation import generate
from nemotron_v3.model.cost import parameters
from nemotron_v3.model.loss import IGNORE_INDEX
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.pages.live import LiveReport
from nemotron_v3.pages.read import SAMPLES
from nemotron_v3.recipes.console import Story
from nemotron_v3.recipes.options import DemoOptions
from nemotron_v3.recipes.plot import plot_loss
from nemotron_v3.recipes.run_folder import METRICS, atomic_run_folder
from nemotron_v3.train.checkpoints import FOLDER as CHECKPOINTS
from nemotron_v3.train.display import Display
from nemotron_v3.train.loop import Step
from nemotron_v3.train.options import (
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
    TrainOptions,
)
from nemotron_v3.train.passes import PassesAtOnce
from nemotron_v3.train.run import train

PROMPT = 'class Queue:\n    """'
SAMPLE_TOKENS = 200
# What comes after training, beside measuring the held-out files: saving, loading, the sample.
AFTERWARDS_SECONDS = 8.0
# Tokens of a pack of whole files; one that is longer is a pack of its own.
MEASURING_TOKENS = 4096
AT_ONCE = 2  # packs that are measured side by side


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


class Corpus:
    """The corpus as a run of training takes it: packs of documents are the rows of a step."""

    def __init__(self, documents: list[list[int]], options: DemoOptions, vocab_size: int):
        self._documents, self._options = documents, options
        self._given = 0
        self.largest_token: int = vocab_size - 1

    def __iter__(self) -> Iterator[list[PackedRow]]:
        options = self._options
        packs = training_packs(
            self._documents, options.tokens_per_row, options.document_tokens, options.seed
        )
        packs = islice(packs, self._given, None)
        while True:
            rows = [as_row(pack) for pack in islice(packs, options.rows)]
            self._given += len(rows)
            yield rows

    def total_steps(self, at_most: int | None = None) -> None:
        """It has no end."""

    def report(self) -> DataReport:
        """The demo tells of its corpus in its own words."""
        return DataReport(())

    def state_dict(self) -> dict[str, Any]:
        """How many packs were given."""
        return {"packs": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on behind them."""
        self._given = state["packs"]


def as_row(pack: Pack) -> PackedRow:
    """A pack with its labels: no document's first token is predicted."""
    borders = [*pack.layout.offsets, pack.layout.num_tokens]
    borders = sorted(set(borders))
    labels = pack.input_ids.clone()
    labels[borders[:-1]] = IGNORE_INDEX
    return PackedRow(pack.input_ids, labels, borders, [(0, 0)] * (len(borders) - 1))


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
    with atomic_run_folder(options.out) as folder:
        text = read_text(options, story)
        tell_model(options, story)
        steps = train_on(text, options, folder, started, story)
        model = from_pretrained(folder)
        bits_per_byte = measure(model, text, folder)
        plot_loss(steps, text.bytes_per_token, bits_per_byte, folder / "loss.png")
        prompt = [SEPARATOR_ID, *text.tokenizer.encode(PROMPT)]
        sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "seed": options.seed}
        texts = generate(
            model, prompt, max_new_tokens=SAMPLE_TOKENS, tokenizer=text.tokenizer, **sampling
        ).text
        assert texts is not None  # there is a tokenizer
        written = texts[0]
        sample = {"prompt": PROMPT, "text": written}
        (folder / SAMPLES).write_text(json.dumps(sample) + "\n", encoding="utf-8")
        page = LiveReport(folder, 1.0, story.console.print).end()
    story.comparison(bits_per_byte)
    story.code(PROMPT, written)
    story.done(options.out, time.perf_counter() - started, page and options.out / page.name)
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


def tell_model(options: DemoOptions, story: Story) -> None:
    config = options.model.config()
    count = parameters(config)
    story.fact(
        "model",
        f"{config.hybrid_override_pattern}, {count.total / 1e6:.1f} M parameters, "
        f"{count.active / 1e6:.1f} M a token",
    )


def train_on(
    text: Text, options: DemoOptions, folder: Path, started: float, story: Story
) -> list[Step]:
    """Train and save; after a Ctrl-C save and raise `KeyboardInterrupt`."""
    steps: list[Step] = []
    try:
        train(
            as_training(options, folder, seconds_left(options, text, started)),
            tokenizer=text.tokenizer,
            make_data=lambda *_: Corpus(text.train, options, text.tokenizer.vocab_size),
            display=Display(story.console, facts=False),
            after_step=steps.append,
            export_if_stopped=True,
        )
    finally:  # a demo is not gone on with
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    return steps


def as_training(options: DemoOptions, folder: Path, seconds: float | None) -> TrainOptions:
    """The demo as a run of training, of so many seconds or of the steps asked for."""
    return TrainOptions(
        out=folder,
        # Told in words: the corpus is made, not read from a file.
        data=DataOptions(
            sources=(Source("the standard library"),),
            tokens_per_row=options.tokens_per_row,
            rows=options.rows,
            seed=options.seed,
            epochs=None,
        ),
        model=ModelOptions(config=options.model.config().to_dict(), device="cpu"),
        optimizer=OptimizerOptions(
            kind="muon",
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            balance=0.01,
        ),
        # So small a model's products are too short to share among cores: each makes a pass.
        memory=MemoryOptions(passes_at_once=options.rows),
        schedule=ScheduleOptions(
            steps=options.steps,
            minutes=None if seconds is None else seconds / 60,
            warmup=0.1,
            shape="linear",
        ),
        save=SaveOptions(every=0),
        seed=options.seed,
    )


def seconds_left(options: DemoOptions, text: Text, started: float) -> float | None:
    """The time for training, where it is not counted in steps."""
    if options.steps is not None:
        return None
    model = NemotronV3ForCausalLM(options.model.config())
    after = AFTERWARDS_SECONDS + measuring_seconds(model, text.held_out)
    # However little time is left, there is a step to take: a training that is over has none.
    return max(60 * options.minutes - (time.perf_counter() - started) - after, 1.0)


def measuring_seconds(model: NemotronV3ForCausalLM, packs: list[Pack]) -> float:
    """How long a forward pass over the packs takes, judged by the smallest of them."""
    smallest = min(packs, key=lambda pack: pack.layout.num_tokens)
    some = [smallest] * AT_ONCE
    total_loss(model, some)  # what only a first pass does is not what is measured
    start = time.perf_counter()
    total_loss(model, some)
    seconds = time.perf_counter() - start
    tokens = sum(pack.layout.num_tokens for pack in packs)
    return seconds / (AT_ONCE * smallest.layout.num_tokens) * tokens


def total_loss(model: NemotronV3ForCausalLM, packs: Iterable[Pack]) -> float:
    """The nats of all predicted tokens of the packs together."""
    model.eval()

    @torch.inference_mode()  # in the thread that makes the pass
    def nats(pack: Pack) -> float:
        loss = model(input_ids=pack.input_ids, labels=pack.input_ids, layout=pack.layout).loss
        return loss.item() * pack.num_targets

    threads = torch.get_num_threads()
    passes = PassesAtOnce(min(AT_ONCE, threads), threads)
    with passes.sharing():
        return sum(passes.each(nats, packs))


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
