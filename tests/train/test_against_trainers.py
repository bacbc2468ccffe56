"""The first step beside other trainers: the loss and the gradient's norm on the same documents."""

import json
from pathlib import Path

import pytest
import torch

from nemotron_v3 import from_pretrained, save_pretrained
from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.data.packed import PackedData
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.train.options import (
    MemoryOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    TrainOptions,
)
from nemotron_v3.train.run import train
from tests.models import tiny_model
from tests.train.test_run import SILENT, lines

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

TEXTS = [f"document {n}: " + "counting up and down again " * (n % 4 + 1) for n in range(9)]
# The assistant's words stand between the marks; TRL and this package read them from the template.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}"
    "{% endfor %}"
)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"count to {n}"},
            {"role": "assistant", "content": " ".join(map(str, range(n)))},
            {"role": "user", "content": "and back"},
            {"role": "assistant", "content": " ".join(map(str, range(n, 0, -1)))},
        ]
    }
    for n in range(2, 8)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Without MoE blocks' routing near its ties: one more rounding would choose other experts."""
    folder = tmp_path_factory.mktemp("base")
    save_pretrained(tiny_model("M*-", dtype=torch.float32, vocab_size=300), folder)
    Tokenizer.train(TEXTS, 300).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def ours(base: Path, out: Path, file: Path) -> tuple[dict, DataOptions]:
    data = DataOptions(sources=(Source(str(file)),), tokens_per_row=128, rows=64)
    options = TrainOptions(
        out=out,
        data=data,
        model=ModelOptions(path=base, device="cpu"),
        schedule=ScheduleOptions(steps=1),
        optimizer=OptimizerOptions(clip_norm=1e9),
        memory=MemoryOptions(rows_per_pass=3),
    )
    train(options, **{**SILENT, "make_data": PackedData})
    return lines(out)[0], data


def their_step(trainer: "transformers.Trainer") -> dict[str, float]:
    """Loss and gradient norm of one optimiser's step, unrounded."""
    losses = []
    step = trainer.training_step

    def kept(*args, **kwargs):
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = kept
    trainer.train()
    norm = next(e["grad_norm"] for e in trainer.state.log_history if "grad_norm" in e)
    return {"loss": sum(loss.item() for loss in losses), "gradient_norm": float(norm)}


def assert_agree(told: dict, theirs: dict, base: Path, documents: list, labels: list) -> None:
    """Against the truth in fp64: no further away than twice the other one, and one roundoff."""
    model = from_pretrained(base, dtype=torch.float64)
    targets = sum(sum(label != -100 for label in each[1:]) for each in labels)
    loss = sum(
        model(torch.tensor(ids), labels=torch.tensor(each), num_items_in_batch=targets).loss
        for ids, each in zip(documents, labels, strict=True)
    )
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert told["targets"] == targets
    for name, true in (("loss", loss.item()), ("gradient_norm", norm.item())):
        # One roundoff of each of the sums that make a scalar: passes and blocks.
        roundoff = 8 * torch.finfo(torch.float32).eps * abs(true)
        allowed = 2 * abs(theirs[name] - true) + roundoff
        assert abs(told[name] - true) <= allowed, (name, told[name], theirs[name], true)


def arguments(folder: Path, count: int) -> dict:
    return {
        "output_dir": str(folder), "max_steps": 1, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": count // 2, "max_grad_norm": 1e9, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "bf16": False,
    }  # fmt: skip


def test_the_first_step_on_documents_is_that_of_transformers(base, tmp_path):
    file = tmp_path / "texts.jsonl"
    texts = TEXTS[:8]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    told, _ = ours(base, tmp_path / "run", file)
    tokenizer = PretrainedTokenizer.load(base)
    before, behind = tokenizer.frame()
    backend = tokenizer.backend
    documents = [
        [*before, *backend.encode(text, add_special_tokens=False).ids, *behind] for text in texts
    ]
    labels = [[-100, *ids[1:]] for ids in documents]

    def padded(batch: list[dict]) -> dict[str, torch.Tensor]:
        S = max(len(each["ids"]) for each in batch)
        made = {"input_ids": [], "attention_mask": [], "labels": []}
        for each in batch:
            n = S - len(each["ids"])
            made["input_ids"].append(each["ids"] + [0] * n)
            made["attention_mask"].append([1] * len(each["ids"]) + [0] * n)
            made["labels"].append(each["labels"] + [-100] * n)
        return {name: torch.tensor(rows) for name, rows in made.items()}

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            **arguments(tmp_path / "theirs", 8), remove_unused_columns=False
        ),
        train_dataset=[
            {"ids": ids, "labels": each} for ids, each in zip(documents, labels, strict=True)
        ],
        data_collator=padded,
    )
    assert_agree(told, their_step(trainer), base, documents, labels)


def test_the_first_step_on_chats_is_that_of_trl(base, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    told, _ = ours(base, tmp_path / "run", file)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    encoded = [
        tokenizer.apply_chat_template(
            chat["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        for chat in CHATS
    ]
    documents = [each["input_ids"] for each in encoded]
    labels = [
        [
            t if m and n else -100
            for n, (t, m) in enumerate(zip(ids, e["assistant_masks"], strict=True))
        ]
        for ids, e in zip(documents, encoded, strict=True)
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(
            **arguments(tmp_path / "theirs", 6), assistant_only_loss=True, max_length=None
        ),
        train_dataset=datasets.Dataset.from_list(CHATS),
        processing_class=tokenizer,
    )
    assert_agree(told, their_step(trainer), base, documents, labels)
