"""transformers' Trainer: bf16 autocast, packing, checkpointing, and a run that is resumed."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from nemotron_v3.hf import is_accelerated, undo
from tests.hf.models import accelerated, close, tokens, transformers_model

pytestmark = pytest.mark.integration
pytest.importorskip("accelerate")


class Documents(Dataset):
    """Of different lengths; the collator makes a pack of each batch."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, n: int) -> dict[str, list[int]]:
        return {"input_ids": tokens(5 + 3 * n % 17, seed=n).tolist()}


def trainer(folder, steps: int, **changes) -> Trainer:
    options = {
        "output_dir": str(folder), "max_steps": steps, "save_steps": 3, "logging_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "report_to": [], "use_cpu": True, "bf16": True, "gradient_checkpointing": True,
        "save_strategy": "steps", "disable_tqdm": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return Trainer(
        accelerated(transformers_model().train(), **changes),
        TrainingArguments(**options),
        train_dataset=Documents(),
        data_collator=DataCollatorWithFlattening(return_seq_idx=True),
    )


@pytest.mark.parametrize("loss", ["logits", "linear"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, loss):
    whole = trainer(tmp_path / "whole", 6, loss=loss)
    whole.train()
    first = trainer(tmp_path / "parts", 3, loss=loss)
    first.train()
    second = trainer(tmp_path / "parts", 6, loss=loss)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))

    expected, found = whole.model.state_dict(), second.model.state_dict()
    assert found.keys() == expected.keys()
    differ = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differ, differ
    start = transformers_model().state_dict()
    still = [n for n in start if "e_score" not in n and torch.equal(start[n], expected[n])]
    assert not still, still  # all was trained
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    assert resumed == losses and len(losses) == 6
    assert is_accelerated(whole.model)

    # The Trainer has taken hold of the model's forward; undo works all the same.
    plain = transformers_model()
    plain.load_state_dict(expected)
    ids = tokens(1, 12)
    undone = undo(whole.model).eval().float()
    with torch.autocast("cpu", torch.bfloat16):
        reference = plain.eval()(ids).logits
    assert close(undone(ids).logits, reference, 0.0)


class Equal(Dataset):
    """Of one length, with labels."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        ids = tokens(9, seed=n)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("loss", ["logits", "linear"])
def test_evaluation_and_prediction_get_the_logits(tmp_path, loss):
    plain = transformers_model().eval()
    model = accelerated(plain, loss=loss)
    seen = []
    options = {"output_dir": str(tmp_path), "report_to": [], "use_cpu": True, "disable_tqdm": True}
    run = Trainer(
        model,
        TrainingArguments(per_device_eval_batch_size=2, **options),
        eval_dataset=Equal(),
        data_collator=default_data_collator,
        compute_metrics=lambda found: seen.append(found) or {"rows": len(found.label_ids)},
    )
    batch = torch.stack([Equal()[n]["input_ids"] for n in range(5)])
    with torch.no_grad():
        expected = plain(batch, labels=batch)
    metrics = run.evaluate()
    predicted = run.predict(Equal())
    assert metrics["eval_rows"] == 5
    assert metrics["eval_loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    for logits in (seen[0].predictions, predicted.predictions):
        assert close(torch.tensor(logits), expected.logits)
