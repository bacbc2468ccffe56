"""A small checkpoint to train from, and runs of it."""

from pathlib import Path

import pytest
import torch

from nemotron_v3 import save_pretrained
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.train.options import (
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
    TrainOptions,
)
from tests.models import tiny_model
from tests.train.fakes import made_up_options


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A checkpoint of all block types in fp32, with a tokeniser."""
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(tiny_model("ME*", dtype=torch.float32, vocab_size=300), folder)
    Tokenizer.train(["counting up, and down again"] * 3, 300).save(folder)
    return folder


@pytest.fixture
def options(base, tmp_path):
    """The options of a short run in fp32, with changes to them."""

    def made(**changes) -> TrainOptions:
        told = {
            "out": tmp_path / "run",
            "data": made_up_options(),
            "model": ModelOptions(path=base, device="cpu"),
            "schedule": ScheduleOptions(steps=8),
            "optimizer": OptimizerOptions(learning_rate=1e-2, balance=1e-3),
            "save": SaveOptions(every=3),
            "memory": MemoryOptions(rows_per_pass=4),
        }
        return TrainOptions(**told | changes)

    return made
