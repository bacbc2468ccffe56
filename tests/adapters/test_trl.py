"""TRL's supervised fine-tuning with packing, bf16 autocast and LoRA, up to a merged model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.tiny import byte_tokenizer, texts, transformers_model
from tests.models import tokens

pytest.importorskip("peft")
trl = pytest.importorskip("trl")
transformers = pytest.importorskip("transformers")

from nemotron_v3 import hf  # noqa: E402
from nemotron_v3.adapters import coverage  # noqa: E402
from nemotron_v3.checkpoint import convert  # noqa: E402
from nemotron_v3.hf.peft import add_lora, load_lora, lora_config  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.integration]
ROOT = Path(__file__).parents[2]

PLAIN = """
import sys, torch, peft, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model.config.model_type = "any"  # PEFT refuses out_proj by the type's name
model = peft.PeftModel.from_pretrained(model, sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3])).logits, sys.argv[4])
assert not any(name.split(".")[0] == "nemotron_v3" for name in sys.modules)
"""


def accelerated(path):
    return hf.accelerate(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    )


def registered(path):
    hf.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    finally:
        hf.unregister()
    assert isinstance(model, hf.NemotronHForCausalLM)
    return model


def arguments(path, **changes):
    options = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 2e-2,
        "packing": True,
        "max_length": 96,
        "bf16": True,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return trl.SFTConfig(output_dir=str(path), **(options | changes))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [accelerated, registered])
def test_packed_sft_of_lora_from_start_to_a_merged_checkpoint(tmp_path, build):
    transformers_model().save_pretrained(tmp_path / "base")
    wrapped = add_lora(build(tmp_path / "base"))
    assert coverage(wrapped).covered_blocks == 6
    frozen = {n: p.clone() for n, p in wrapped.named_parameters() if not p.requires_grad}
    learnt = {n: p.clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert any("out_proj" in n for n in learnt) and any("in_proj" in n for n in learnt)
    trainer = trl.SFTTrainer(
        wrapped,
        arguments(tmp_path / "run"),
        train_dataset=texts(),
        processing_class=byte_tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and (batch["position_ids"] == 0).sum() > 3
    autocast = []
    wrapped.get_base_model().model.layers[0].mixer.in_proj.register_forward_hook(
        lambda module, args, out: autocast.append(out.dtype)
    )
    trainer.train()
    assert set(autocast) == {torch.bfloat16}
    found = losses(trainer)
    assert sum(found[-3:]) / 3 < 0.9 * found[0]
    now = dict(wrapped.named_parameters())
    assert all(torch.equal(tensor, now[name]) for name, tensor in frozen.items())
    still = [name for name, tensor in learnt.items() if torch.equal(tensor, now[name])]
    assert not still

    trainer.save_model(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(learnt)
    ids = tokens(2, 40, vocab=258)
    # The trainer leaves its autocast on the model that it was given: compare without it.
    again = load_lora(accelerated(tmp_path / "base"), tmp_path / "adapter").eval()
    held = dict(again.named_parameters())
    assert all(torch.equal(tensor, held[name]) for name, tensor in now.items())
    with torch.no_grad():
        expected = again(ids).logits
    scale = expected.abs().max()
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = transformers.NemotronHForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    base = transformers.NemotronHForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        assert (merged.eval()(ids).logits - expected).abs().max() < 2e-5 * scale
        assert (base.eval()(ids).logits - expected).abs().max() > 1e-2 * scale
    assert (plain_logits(tmp_path, ids) - expected).abs().max() < 2e-5 * scale


def plain_logits(path, ids):
    """What the saved adapter gives in PEFT and transformers, without this package."""
    torch.save(ids, path / "ids.pt")
    names = [str(path / name) for name in ("base", "adapter", "ids.pt", "logits.pt")]
    subprocess.run(
        [sys.executable, "-c", PLAIN, *names],
        cwd=path, check=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return torch.load(path / "logits.pt")


def test_packing_is_training_on_each_document_alone(tmp_path):
    """The loss of a packed batch is that of its documents one by one, weighted by their targets."""
    transformers_model().save_pretrained(tmp_path / "base")
    model = accelerated(tmp_path / "base")
    trainer = trl.SFTTrainer(
        add_lora(model),
        arguments(tmp_path / "run", bf16=False),
        train_dataset=texts(),
        processing_class=byte_tokenizer(),
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert len(starts) > 3
    with torch.no_grad():
        packed = model(**batch)
        total, count = 0.0, 0
        for first, last in zip(starts, [*starts[1:], len(ids)], strict=True):
            alone = model(ids[None, first:last], labels=labels[None, first:last])
            targets = int((labels[first + 1 : last] != -100).sum())
            total, count = total + float(alone.loss) * targets, count + targets
            part = packed.logits[0, first:last]
            assert (part - alone.logits[0]).abs().max() < 1e-5 * alone.logits.abs().max()
    assert abs(float(packed.loss) - total / count) < 1e-5


def test_checkpointed_gradients_change_no_loss(tmp_path):
    transformers_model().save_pretrained(tmp_path / "base")
    runs = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = accelerated(tmp_path / "base")
        wrapped = add_lora(model, lora_config(model, r=4))
        options = arguments(tmp_path / "run", max_steps=4, gradient_checkpointing=checkpointing)
        trainer = trl.SFTTrainer(
            wrapped, options, train_dataset=texts(), processing_class=byte_tokenizer()
        )
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1], json.dumps(runs)


def test_a_run_that_is_resumed_equals_one_that_was_not_interrupted(tmp_path):
    transformers_model().save_pretrained(tmp_path / "base")

    def train(path, steps, resume=None):
        torch.manual_seed(0)
        wrapped = add_lora(accelerated(tmp_path / "base"))
        options = arguments(path, save_strategy="steps", save_steps=3, lr_scheduler_type="constant")
        options.max_steps = steps
        trainer = trl.SFTTrainer(
            wrapped, options, train_dataset=texts(), processing_class=byte_tokenizer()
        )
        trainer.train(resume_from_checkpoint=resume)
        return {n: p for n, p in wrapped.named_parameters() if p.requires_grad}

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "pieces", 3)
    resumed = train(tmp_path / "pieces", 6, resume=True)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_the_trainer_may_add_the_adapter_itself(tmp_path):
    transformers_model().save_pretrained(tmp_path / "base")
    model = accelerated(tmp_path / "base")
    options = arguments(tmp_path / "run", max_steps=2)
    given = {"train_dataset": texts(), "processing_class": byte_tokenizer()}
    trainer = trl.SFTTrainer(model, options, peft_config=lora_config(model, r=4), **given)
    trainer.train()
    assert coverage(trainer.model).covered_blocks == 6
    b = [p for n, p in trainer.model.named_parameters() if "out_proj.lora_B" in n]
    assert len(b) == 2 and all(p.abs().sum() > 0 for p in b)


def test_a_preference_trainer_adds_its_reference_adapter(tmp_path):
    import datasets

    transformers_model().save_pretrained(tmp_path / "base")
    pairs = [{"prompt": "q" * i, "chosen": " yes", "rejected": " no"} for i in range(1, 5)]
    options = trl.DPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=add_lora(accelerated(tmp_path / "base")),
        args=options,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] != found[0]
