"""TRL's trainers on models of transformers: plain, accelerated and registered, in full and with
LoRA on every projection.

Also the copies of a policy that a trainer builds itself: at the first step policy and reference
must be one function of the same weights.
"""

import math

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")
pytest.importorskip("datasets")

from nemotron_v3 import hf
from tests.accuracy import relative_error
from tests.hf.trl_runs import (
    COLUMNS,
    TRAINERS,
    Step,
    build,
    column,
    first_step,
    load,
    write_checkpoints,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.integration]
HALF_EPS = torch.finfo(torch.float32).eps / 2


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl")
    write_checkpoints(path)
    return path


def whole(step: Step) -> torch.Tensor:
    return torch.cat([step.gradients[name].double().flatten() for name in sorted(step.gradients)])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_first_loss_and_gradient_are_those_of_plain_transformers(checkpoints, tmp_path, lora):
    """By the accuracy rule, against a run in fp64 by the reference. A loss is one number: those of
    all trainers and micro-batches are measured together."""
    steps = {
        (name, where): first_step(name, where, lora, checkpoints, tmp_path)[0]
        for name in TRAINERS
        for where in [*COLUMNS, "truth"]
    }
    failures = []
    for name in TRAINERS:
        true = steps[name, "truth"]
        out_proj = [g for n, g in true.gradients.items() if "out_proj" in n]
        assert out_proj and any(g.any() for g in out_proj)
        errors = {}
        for where in COLUMNS:
            step = steps[name, where]
            assert step.gradients.keys() == true.gradients.keys()
            errors[where] = relative_error(whole(step), whole(true))
            norm = float(abs(step.norm - true.norm) / true.norm)
            assert norm <= errors[where]  # so that the rule holds of the norm if it does here
        allowed = 2 * errors["plain"] + HALF_EPS
        failures += [
            f"{name} {where}: {errors[where]:.2e} > {allowed:.2e}"
            for where in COLUMNS
            if not errors[where] <= allowed
        ]
    losses = {
        where: torch.cat([steps[name, where].losses.double() for name in TRAINERS])
        for where in [*COLUMNS, "truth"]
    }
    errors = {w: relative_error(losses[w], losses["truth"]) for w in COLUMNS}
    allowed = 2 * errors["plain"] + HALF_EPS
    failures += [f"losses {w}: {errors[w]:.2e} > {allowed:.2e}" for w in COLUMNS[1:]
                 if not errors[w] <= allowed]  # fmt: skip
    assert not failures, "\n".join(failures)


# --- a reference that the trainer builds ------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
@pytest.mark.parametrize("everything", [True, False], ids=["everything", "registered"])
def test_a_reference_is_accelerated_and_stays_as_it_was(
    checkpoints, tmp_path, monkeypatch, name, bf16, everything
):
    changes = {
        "max_steps": 5,
        "learning_rate": 1e-3,
        "bf16": bf16,
        "gradient_accumulation_steps": 1,
    }
    runs = []
    for explicit in (False, True):
        try:
            if everything:
                policy = hf.accelerate(load(name, "plain", checkpoints), everything=True)
            else:
                hf.register()
                policy = load(name, "registered", checkpoints)
            given = load(name, "registered", checkpoints) if explicit else None
            if explicit and name in ("GRPO", "RLOO"):  # which have no argument for it
                where = f"trl.trainer.{name.lower()}_trainer.create_model_from_path"
                monkeypatch.setattr(where, lambda *_, model=given, **__: model)
                given = None
            trainer = build(name, policy, tmp_path, given, **changes)
        finally:
            hf.unregister()
        reference = trainer.accelerator.unwrap_model(trainer.ref_model)
        assert reference is not trainer.model
        assert hf.is_accelerated(reference) and hf.is_accelerated(trainer.model)
        before = {n: p.detach().clone() for n, p in reference.named_parameters()}
        trained = dict(trainer.model.named_parameters())
        assert all(p.data_ptr() != trained[n].data_ptr() for n, p in reference.named_parameters())
        trainer.train()
        assert all(torch.equal(p, before[n]) for n, p in reference.named_parameters())
        still = [n for n, p in trained.items() if torch.equal(p, before[n])]
        assert not still, still
        runs.append(trainer)
    mine, explicit = runs
    losses = torch.stack(mine.seen)
    assert len(losses) == 5 and torch.equal(losses, torch.stack(explicit.seen))
    first = next(entry for entry in mine.state.log_history if "loss" in entry)
    if name == "DPO":
        assert float(losses[0]) == pytest.approx(math.log(2), abs=1e-7)
        assert first["rewards/margins"] == 0.0
    elif name == "KTO":
        assert float(losses[0]) == 0.5
    else:
        assert first["kl"] == 0.0
        assert max(e["kl"] for e in mine.state.log_history if "kl" in e) > 1e-3  # it is looked at


def test_the_dt_floor_tells_an_accelerated_policy_from_a_plain_reference(checkpoints, tmp_path):
    """What `accelerate(policy)` alone does not reach, and `everything` does."""
    found = {}
    for everything in (False, True):
        with column("plain"):
            policy = load("DPO", "plain", checkpoints)
            policy.config.time_step_min = 0.09
            policy.save_pretrained(tmp_path / "floored")
            policy.config._name_or_path = str(tmp_path / "floored")
            hf.accelerate(policy, everything=everything)
            trainer = build("DPO", policy, tmp_path, max_steps=1, gradient_accumulation_steps=1)
            assert hf.is_accelerated(trainer.ref_model) is everything
            trainer.train()
            found[everything] = abs(float(trainer.seen[0]) - math.log(2))
    assert found[True] < 1e-7 and found[False] > 1e-3
