"""Texts that a model in training writes, so that one sees what its loss means."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.fsdp import FSDPModule

from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.metrics import reopened
from nemotron_v3.train.options import LogOptions

SAMPLES = "samples.jsonl"
# Continues prompts: of (model, prompts, tokens to write, tokenizer) the texts behind them. Where
# the model is spread over processes each of them calls it, and all have to call the model equally
# often.
Continue = Callable[[NemotronV3ForCausalLM, Sequence[str], int, Any], list[str]]


def is_spread(model: Any) -> bool:
    """Whether a model's weights are shared out over processes, which then pass it together."""
    return isinstance(model, FSDPModule)


class Samples:
    """Writes samples.jsonl, a line for each prompt whenever it is asked.

    Every process has one. Where the model is spread over the processes all of them continue the
    prompts together; copies of a model leave that to the first one. The first one writes.

    Args:
        folder: of the run.
        options: the prompts.
        write_on: who continues prompts.
        tokenizer: of the model.
        say: takes a sentence for the user.
        first: whether this is the process that writes.
    """

    def __init__(
        self,
        folder: Path,
        options: LogOptions,
        write_on: Continue,
        tokenizer: Any,
        say: Callable[[str], None],
        first: bool = True,
    ):
        self._options, self._write_on, self._tokenizer = options, write_on, tokenizer
        self._say, self._path, self._first = say, folder / SAMPLES, first
        self._file: IO[str] | None = None

    def open(self, step: int) -> None:
        """Begin, or go on from a step: lines of later ones are taken out."""
        self._last = step
        if self._first:
            self._file = reopened(self._path, step)

    def take(self, model: NemotronV3ForCausalLM, step: int) -> None:
        """Continue the prompts, once a step. No error of that ends the run: it is told.

        Only of a model that is spread, an error that other processes may not have had (no memory)
        does: they would wait for this process for ever.
        """
        if step == self._last:
            return
        self._last = step
        spread = is_spread(model)
        if not (self._first or spread):
            return
        try:
            texts = self._texts(model)
        except Exception as error:
            if spread and not isinstance(error, (ValueError, ArithmeticError)):
                raise
            self._say(f"step {step:,}  no samples: {type(error).__name__}: {error}")
            return
        if self._file is None:
            return
        for prompt, text in zip(self._options.samples, texts, strict=True):
            line = {"step": step, "prompt": prompt, "text": text}
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _texts(self, model: NemotronV3ForCausalLM) -> list[str]:
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                asked = self._options
                return self._write_on(model, asked.samples, asked.sample_tokens, self._tokenizer)
        finally:
            model.train(training)

    def close(self) -> None:
        """Nothing more will come."""
        if self._file is not None:
            self._file.close()
