"""Texts that a model in training writes, so that one sees what its loss means."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.metrics import reopened
from nemotron_v3.train.options import LogOptions

SAMPLES = "samples.jsonl"
# Continues prompts: of (model, prompts, tokens to write, tokenizer) the texts behind them.
Continue = Callable[[NemotronV3ForCausalLM, Sequence[str], int, Any], list[str]]


class Samples:
    """Writes samples.jsonl, a line for each prompt whenever it is asked.

    Args:
        folder: of the run.
        options: the prompts.
        write_on: who continues prompts.
        tokenizer: of the model.
        say: takes a sentence for the user.
    """

    def __init__(
        self,
        folder: Path,
        options: LogOptions,
        write_on: Continue,
        tokenizer: Any,
        say: Callable[[str], None],
    ):
        self._options, self._write_on, self._tokenizer = options, write_on, tokenizer
        self._say, self._path = say, folder / SAMPLES

    def open(self, step: int) -> None:
        """Begin, or go on from a step: lines of later ones are taken out."""
        self._last, self._file = step, reopened(self._path, step)

    def take(self, model: NemotronV3ForCausalLM, step: int) -> None:
        """Continue the prompts, once a step. No error of that ends the run: it is told."""
        if step == self._last:
            return
        self._last = step
        prompts, training = self._options.samples, model.training
        model.eval()
        try:
            with torch.no_grad():
                texts = self._write_on(model, prompts, self._options.sample_tokens, self._tokenizer)
        except Exception as error:
            self._say(f"step {step:,}  no samples: {type(error).__name__}: {error}")
            return
        finally:
            model.train(training)
        for prompt, text in zip(prompts, texts, strict=True):
            line = {"step": step, "prompt": prompt, "text": text}
            self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing more will come."""
        self._file.close()
