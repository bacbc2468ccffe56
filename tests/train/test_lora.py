"""Adapters that a run trains are PEFT's for everybody else."""

from pathlib import Path

import pytest
import torch

from nemotron_v3 import from_pretrained, save_pretrained
from nemotron_v3.checkpoint import convert, merge_adapter
from nemotron_v3.train.options import (
    LoraOptions,
    ModelOptions,
    OptimizerOptions,
    SaveOptions,
    ScheduleOptions,
)
from nemotron_v3.train.run import train
from tests.models import tiny_model, tokens
from tests.train.test_run import SILENT, Crash, crash_after, losses

pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf
from nemotron_v3.hf import lora
from nemotron_v3.hf.peft import load_lora

pytestmark = pytest.mark.filterwarnings("ignore")

GROUPS = ("attention", "mamba", "mlp", "shared", "routed")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    from nemotron_v3.data.tokenizer import Tokenizer

    save_pretrained(tiny_model("ME*-", dtype=torch.float32, vocab_size=300), folder)
    Tokenizer.train(["counting up, and down again"] * 3, 300).save(folder)
    return folder


@pytest.fixture
def asked(options, base):
    def made(**changes):
        told = {
            "model": ModelOptions(path=base, device="cpu"),
            "lora": LoraOptions(rank=3, groups=GROUPS),
            "optimizer": OptimizerOptions(learning_rate=3e-2),
            "schedule": ScheduleOptions(steps=5),
            "save": SaveOptions(every=2),
        }
        return options(**told | changes)

    return made


def test_one_adapter_of_projections_and_experts_is_pefts(asked, base, tmp_path):
    """What the run trained: saved, loaded by PEFT into transformers, and merged by convert."""
    kept = {}

    class Keeping:
        add = staticmethod(lora.add)

        @staticmethod
        def save(model, *args):
            kept["model"] = model
            lora.save(model, *args)

    options = asked()
    train(options, adapters=Keeping, **SILENT)
    told = losses(options.out)
    assert told[5] < told[1]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in options.out.iterdir()
    }
    assert not (options.out / "config.json").exists()
    trained = kept["model"].eval()
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = trained(ids).logits
        from transformers import AutoModelForCausalLM

        theirs = hf.accelerate(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
        convert(base, tmp_path / "merged", adapter=options.out)
        merged = from_pretrained(tmp_path / "merged")
        plain = from_pretrained(base)(ids).logits
        loaded = load_lora(theirs, options.out).eval()
        in_memory = from_pretrained(base)
        merge_adapter(in_memory, options.out)  # what `generate --adapter` runs
        for other in (loaded, merged, in_memory):
            logits = other(ids).logits
            assert (logits - expected).abs().max() < 2e-5 * expected.abs().max(), type(other)
    assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


def test_an_adapter_goes_on_to_the_bit_and_its_saves_hold_nothing_frozen(asked, tmp_path):
    whole = asked(out=tmp_path / "whole")
    train(whole, adapters=lora, **SILENT)
    options = asked()
    with pytest.raises(Crash):
        train(options, adapters=lora, **SILENT, after_step=crash_after(3))
    (save,) = (options.out / "checkpoints").glob("step-*")
    assert sum(p.stat().st_size for p in save.iterdir()) < 400_000
    train(options, adapters=lora, resume=True, **SILENT)
    assert losses(options.out) == losses(whole.out)
    first, second = (r.out / "adapter_model.safetensors" for r in (options, whole))
    assert first.read_bytes() == second.read_bytes()


def test_another_rank_is_another_run_and_a_group_that_is_not_there_an_error(asked):
    with pytest.raises(ValueError, match="did you mean 'mamba'"):
        train(asked(lora=LoraOptions(rank=2, groups=("mambo",))), adapters=lora, **SILENT)
    with pytest.raises(ValueError, match="put on by PEFT"):
        train(asked(), **SILENT)
    options = asked(schedule=ScheduleOptions(steps=1))
    train(options, adapters=lora, **SILENT)
    other = asked(lora=LoraOptions(rank=2, groups=GROUPS))
    with pytest.raises(ValueError, match="of another run.*lora was"):
        train(other, adapters=lora, resume=True, **SILENT)
