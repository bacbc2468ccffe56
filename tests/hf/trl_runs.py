"""TRL's trainers on one tiny checkpoint, and what their first step computes."""

import contextlib
from dataclasses import dataclass

import torch
import trl
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    NemotronHForCausalLM,
    TrainerCallback,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHPreTrainedModel

from nemotron_v3 import BackendConfig, hf
from nemotron_v3.hf.peft import lora_config
from tests.adapters.tiny import byte_tokenizer, transformers_model

TRAINERS = ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward"]
COLUMNS = ["plain", "accelerated", "registered"]
ROWS, MICRO_BATCHES = 4, 4


class Scored(GenericForSequenceClassification, NemotronHPreTrainedModel):
    """The reward model of plain transformers, which has no such class."""


def write_checkpoints(path):
    """A language model, and a reward model on the same backbone; the dt floor is out of reach."""
    blocks = ["mamba", "moe", "attention", "mlp"]
    model = transformers_model(layers_block_type=blocks, num_labels=1)
    model.save_pretrained(path / "policy")
    torch.manual_seed(0)
    scored = Scored.from_pretrained(path / "policy", num_labels=1)
    scored.save_pretrained(path / "scored")


def data(name):
    rows = []
    for i in range(ROWS * MICRO_BATCHES):
        prompt, good, bad = f"{i} plus {i} is ", f"{2 * i}. " * 4, "what? " * (1 + i % 3)
        row = {
            "SFT": {"text": prompt + good},
            "DPO": {"prompt": prompt, "chosen": good, "rejected": bad},
            "KTO": {"prompt": prompt, "completion": bad if i % 2 else good, "label": i % 2 == 0},
            "Reward": {"chosen": prompt + good, "rejected": prompt + bad},
        }
        rows.append(row.get(name, {"prompt": prompt}))
    return Dataset.from_list(rows)


def lengths(completions, **_):
    return [float(len(text)) for text in completions]


def fixed_completions(prompts):
    """Of different lengths, the same in every run."""
    return [[70 + (7 * i + 3 * j) % 90 for j in range(4 + i % 5)] for i, _ in enumerate(prompts)]


class FixedGRPO(trl.GRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return fixed_completions(prompt_ids), None


class FixedRLOO(trl.RLOOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        return fixed_completions(prompt_ids)


def options(name, folder, **changes):
    config = getattr(trl, f"{name}Config")
    given = {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": MICRO_BATCHES, "learning_rate": 0.0, "max_grad_norm": 0.0,
        "logging_steps": 1, "save_strategy": "no", "report_to": [], "disable_tqdm": True,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
    }  # fmt: skip
    if name in ("GRPO", "RLOO"):
        given |= {"num_generations": 2, "max_completion_length": 16, "beta": 0.1}
    if name == "DPO":
        given["beta"] = 1.0
    return config(**given | changes)


@contextlib.contextmanager
def column(name):
    """While it is open: how the models of a column are made."""
    if name == "registered":
        hf.register()
    if name == "truth":
        hf.register(backend=BackendConfig(impl="reference"))
    try:
        yield
    finally:
        hf.unregister()


def load(trainer, where, path):
    """The model that a user of the column hands to the trainer, in eval mode's weights."""
    folder = path / ("scored" if trainer == "Reward" else "policy")
    dtype = torch.float64 if where == "truth" else torch.float32
    if where in ("plain", "accelerated"):
        model = (Scored if trainer == "Reward" else NemotronHForCausalLM).from_pretrained(folder)
        return hf.accelerate(model) if where == "accelerated" else model
    auto = AutoModelForSequenceClassification if trainer == "Reward" else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


@contextlib.contextmanager
def out_proj_let_through(model, where):
    """PEFT refuses adapters of a plain `out_proj` by the model's type; the PyTorch path reads
    them."""
    if where == "plain":
        model.config.model_type = "any"
        try:
            yield
        finally:
            del model.config.model_type
    else:
        yield


def with_lora(model, trainer):
    torch.manual_seed(0)
    task = "SEQ_CLS" if trainer == "Reward" else "CAUSAL_LM"
    settings = lora_config(model, r=4, task_type=task)
    return get_peft_model(model, settings, autocast_adapter_dtype=False)


@dataclass
class Step:
    """The losses of the micro-batches and every gradient, of the first step."""

    losses: torch.Tensor
    gradients: dict[str, torch.Tensor]

    @property
    def norm(self):
        return torch.cat([g.double().flatten() for g in self.gradients.values()]).norm()


class Reads(TrainerCallback):
    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )


def build(name, model, folder, reference=None, **changes):
    """The trainer, which keeps the losses that it computes in `seen`."""
    kinds = {"GRPO": FixedGRPO, "RLOO": FixedRLOO}
    kind = kinds.get(name) or getattr(trl, f"{name}Trainer")
    given = {"reward_funcs": lengths} if name in kinds else {}
    if reference is not None:
        given["ref_model"] = reference
    trainer = kind(
        model,
        args=options(name, folder, **changes),
        train_dataset=data(name),
        processing_class=byte_tokenizer(),
        **given,
    )
    trainer.seen = []
    compute_loss = trainer.compute_loss

    def watched(*args, **kwargs):
        found = compute_loss(*args, **kwargs)
        loss = found[0] if isinstance(found, tuple) else found
        trainer.seen.append(loss.detach().clone())
        return found

    trainer.compute_loss = watched
    return trainer


def first_step(name, where, lora, path, folder):
    with column(where):
        model = load(name, where, path)
        with out_proj_let_through(model, where) if lora else contextlib.nullcontext():
            adapted = with_lora(model, name) if lora else model
            adapted = adapted.double() if where == "truth" else adapted
            reference = None
            if where == "accelerated" and not lora and name in ("DPO", "KTO"):
                reference = load(name, where, path)  # TRL builds one of transformers' otherwise
            trainer = build(name, adapted, folder, reference)
        reads = Reads()
        trainer.add_callback(reads)
        trainer.train()
    assert hf.is_accelerated(trainer.model) == (where != "plain")
    reference = getattr(trainer, "ref_model", None)
    if reference is not None and where in ("registered", "truth"):
        assert hf.is_accelerated(reference)
    return Step(torch.stack(trainer.seen), reads.gradients[0]), trainer
