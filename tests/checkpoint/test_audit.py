"""Each way in which a load can go wrong silently is planted here, and must be found."""

import pytest
import torch
from torch import nn

from nemotron_v3.checkpoint import CheckpointError, audit, from_pretrained, load, save_pretrained
from nemotron_v3.checkpoint.audit import Ledger
from tests.checkpoint.files import released_tensors, write_checkpoint
from tests.models import tiny_config, tiny_model

CONFIG = tiny_config(num_nextn_predict_layers=1)


@pytest.fixture
def directory(tmp_path):
    return write_checkpoint(tmp_path / "checkpoint", released_tensors(CONFIG), CONFIG)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("layers", [None, 3, [1, 4]])
def test_a_fresh_load_passes(directory, dtype, layers):
    model = from_pretrained(directory, dtype=dtype, layers=layers)
    assert audit(model, directory) == model.checkpoint_origin.report


def test_a_cast_after_the_load_passes_and_is_reported(directory):
    model = from_pretrained(directory, dtype=torch.bfloat16).float()
    assert audit(model, directory).casts["bfloat16 -> float32"] > 50


@pytest.mark.parametrize(
    ("name", "disk"),
    [
        ("model.layers.0.mixer.dt_bias", "backbone.layers.0.mixer.dt_bias"),
        ("model.layers.1.mixer.gate.e_score_correction_bias", None),
        ("lm_head.weight", None),
        ("model.norm_f.weight", None),
    ],
)
def test_one_bit_of_any_tensor_is_found(directory, name, disk):
    model = from_pretrained(directory)
    tensor = dict(model.named_parameters()) | dict(model.named_buffers())
    flat = tensor[name].detach().view(-1)[-1:]
    flat.view(torch.int16 if flat.itemsize == 2 else torch.int32).bitwise_xor_(1)
    with pytest.raises(CheckpointError) as caught:
        audit(model, directory)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"{name} differs from {disk or ''}")


def test_the_expert_that_differs_is_named(directory):
    model = from_pretrained(directory)
    model.model.layers[1].mixer.experts.down_proj.data[5].neg_()
    with pytest.raises(CheckpointError, match=r"experts\.down_proj differs from .*experts\.5\."):
        audit(model, directory)


def test_negative_zero_and_nan_are_told_apart(tmp_path):
    tensors = released_tensors(CONFIG)
    name = "backbone.norm_f.weight"
    tensors[name][:2] = torch.tensor([0.0, float("nan")])
    write_checkpoint(tmp_path, tensors, CONFIG)
    model = from_pretrained(tmp_path)
    audit(model, tmp_path)
    model.model.norm_f.weight.data[0] = -0.0
    with pytest.raises(CheckpointError, match="model.norm_f.weight differs"):
        audit(model, tmp_path)


def test_fp32_names_below_fp32_are_found(directory):
    model = from_pretrained(directory, dtype=torch.bfloat16)
    mixer = model.model.layers[0].mixer
    mixer.A_log = nn.Parameter(mixer.A_log.detach().to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="A_log is torch.bfloat16, which is narrower than"):
        audit(model, directory)


def test_carried_tensors_are_compared(directory):
    model = from_pretrained(directory)
    names = sorted(model.mtp)
    del model.mtp[names[0]]
    model.mtp[names[1]] = model.mtp[names[1]] + 1
    model.mtp["mtp.more"] = torch.ones(1)
    with pytest.raises(CheckpointError) as caught:
        audit(model, directory)
    assert set(caught.value.problems) == {
        f"{names[0]} is not carried along",
        f"{names[1]} differs",
        "mtp.more is not in the file",
    }


def test_a_model_that_was_never_loaded_is_not_the_checkpoint(directory):
    with pytest.raises(CheckpointError, match="the model is not the checkpoint") as caught:
        audit(tiny_model(), directory)
    assert len(caught.value.problems) > 50


def test_a_saved_model_passes_against_what_it_wrote(directory, tmp_path):
    for layers in (None, [1, 4]):
        model = from_pretrained(directory, dtype=torch.float32, layers=layers)
        for parameter in model.parameters():
            parameter.data.mul_(1.1)
        save_pretrained(model, tmp_path / "saved")
        audit(model, tmp_path / "saved")


# ---- what happens inside a load


def plant(monkeypatch, fault):
    """Run `fault(model)` between the filling of a model and the proof."""
    install = Ledger.install

    def install_and_fail(ledger, model):
        install(ledger, model)
        fault(model)

    monkeypatch.setattr(Ledger, "install", install_and_fail)


def reinitialise(model):
    model.init_weights()


def zero_a_bias(model):
    model.model.layers[1].mixer.gate.e_score_correction_bias.zero_()


def exchange_a_parameter(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def cast_a_parameter(model):
    mixer = model.model.layers[0].mixer
    mixer.A_log = nn.Parameter(mixer.A_log.detach().half())


def add_a_parameter(model):
    model.model.extra = nn.Parameter(torch.ones(1))


def add_a_transient_buffer(model):
    model.register_buffer("cache", torch.ones(1), persistent=False)


def remove_a_parameter(model):
    del model.model.norm_f.weight


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (reinitialise, "dt_bias was written to after it was filled"),
        (zero_a_bias, "e_score_correction_bias was written to after"),
        (exchange_a_parameter, "lm_head.weight is not the tensor that was filled"),
        (cast_a_parameter, "A_log is not the tensor that was filled"),
        (add_a_parameter, "model.extra was not filled"),
        (add_a_transient_buffer, "cache was not filled"),
        (remove_a_parameter, "model.norm_f.weight is not in the model"),
    ],
)
def test_a_fault_between_filling_and_returning_is_found(directory, monkeypatch, fault, message):
    plant(monkeypatch, fault)
    with pytest.raises(CheckpointError, match="the load cannot be proven") as caught:
        from_pretrained(directory)
    assert message in str(caught.value)


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("part", ["experts.3.up_proj.weight", "gate.weight"])
def test_a_tensor_skipped_or_filled_twice_is_found(directory, monkeypatch, part, times):
    plan_load = load.plan_load

    def plan_badly(*args):
        plan = plan_load(*args)
        odd = [f for f in plan.fills if f.disk == f"backbone.layers.1.mixer.{part}"]
        plan.fills = [f for f in plan.fills if f not in odd] + odd * times
        return plan

    monkeypatch.setattr(load, "plan_load", plan_badly)
    with pytest.raises(CheckpointError, match="the load cannot be proven") as caught:
        from_pretrained(directory)
    assert len(caught.value.problems) == 1
