"""PEFT's adapters on accelerated models: what they compute, train and save."""

import copy

import pytest
import torch

from tests.accuracy import relative_error
from tests.adapters.tiny import disturb_adapter, transformers_model
from tests.models import tokens

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf  # noqa: E402
from nemotron_v3.adapters import coverage, lora_targets  # noqa: E402
from nemotron_v3.checkpoint import convert, from_pretrained  # noqa: E402
from nemotron_v3.hf.peft import (  # noqa: E402
    add_lora,
    load_lora,
    lora_config,
    projections_as_modules,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def plain_lora(model, config):
    """PEFT on transformers' own model. In its plain path out_proj is called as a module too, and
    the type by which PEFT refuses is taken out of its sight."""
    model.config.model_type = "any"
    return peft.get_peft_model(model, config)


def run(model, ids):
    """Logits and the gradients of the adapter, from a loss that sees every logit."""
    logits = model(ids).logits
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits).to(logits.dtype)
    (logits * weights).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_dora": True},
        {"groups": ["mamba", "routed"]},
        {"groups": ["head", "attention"], "use_rslora": True},
    ],
    ids=["default", "dora", "routed", "head"],
)
def test_logits_and_gradients_are_those_of_plain_transformers(settings):
    settings = dict(settings)
    model = transformers_model()
    config = lora_config(model, settings.pop("groups", None), r=3, **settings)
    ids = tokens(2, 33, vocab=258)
    plain = plain_lora(copy.deepcopy(model), config)
    ours = add_lora(hf.accelerate(model), config)
    disturb_adapter(plain)
    ours.load_state_dict(plain.state_dict())
    double = copy.deepcopy(plain).double()
    double.config._experts_implementation = "eager"  # the others have no fp64
    true = run(double, ids)
    theirs, found = run(plain, ids), run(ours, ids)
    assert theirs.keys() == found.keys() == true.keys() and len(found) > 5
    roundoff = torch.finfo(torch.float32).eps / 2
    worst = {}
    for name, tensor in found.items():
        assert true[name].norm() > 0, name
        allowed = 2 * relative_error(theirs[name], true[name]) + roundoff
        worst[name] = relative_error(tensor, true[name]) / allowed
    assert max(worst.values()) <= 1, {n: r for n, r in worst.items() if r > 1}


def test_the_adapter_of_out_proj_acts_and_learns():
    """Where out_proj's weight is read instead of calling the module, both are zero."""
    model = hf.accelerate(transformers_model())
    ids = tokens(2, 20, vocab=258)
    with torch.no_grad():
        before = model(ids).logits
    wrapped = add_lora(model, lora_config(model, ["mamba"], r=3))
    with torch.no_grad():
        assert torch.equal(wrapped(ids).logits, before)  # B is 0 at first
    run(wrapped, ids)
    b = {n: p for n, p in wrapped.named_parameters() if "out_proj.lora_B" in n}
    assert len(b) == 2 and all(p.grad.norm() > 0 for p in b.values())
    with torch.no_grad():
        for parameter in b.values():
            parameter.copy_(-0.1 * parameter.grad / parameter.grad.norm())
        after = wrapped(ids).logits
        assert (after - before).abs().max() > 1e-3
        for parameter in b.values():
            parameter.zero_()
        assert torch.equal(wrapped(ids).logits, before)
    wrapped.zero_grad()
    disturb_adapter(wrapped)
    grads = run(wrapped, ids)
    a = [n for n in grads if "out_proj.lora_A" in n]
    assert len(a) == 2 and all(grads[n].norm() > 0 for n in a)


def test_merging_and_disabling_compute_the_same():
    ids = tokens(2, 20, vocab=258)
    model = hf.accelerate(transformers_model())
    with torch.no_grad():
        before = model(ids).logits
        wrapped = add_lora(model).eval()
        disturb_adapter(wrapped)
        adapted = wrapped(ids).logits
        with wrapped.disable_adapter():
            assert torch.equal(wrapped(ids).logits, before)
        merged = wrapped.merge_and_unload()
        assert hf.is_accelerated(merged)
        logits = merged(ids).logits
    assert (adapted - before).abs().max() > 0.1
    assert (logits - adapted).abs().max() < 2e-5 * adapted.abs().max()


def test_a_saved_adapter_loads_everywhere_with_equal_logits(tmp_path):
    """In an accelerated model, in plain transformers, and merged into a checkpoint of ours."""
    ids = tokens(2, 20, vocab=258)
    model = transformers_model()
    model.save_pretrained(tmp_path / "base")
    wrapped = add_lora(hf.accelerate(model)).eval()
    disturb_adapter(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = wrapped(ids).logits
        again = load_lora(hf.accelerate(transformers_model()), tmp_path / "adapter").eval()
        assert torch.equal(again(ids).logits, expected)
        plain = transformers_model()
        plain.config.model_type = "any"
        plain = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
        merged = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        native = from_pretrained(tmp_path / "merged")
        for other in (plain, merged, native):
            logits = other(ids).logits
            assert (logits - expected).abs().max() < 2e-5 * expected.abs().max(), type(other)


def test_an_adapter_of_the_native_model_is_an_adapter_of_transformers(tmp_path):
    """The names are the same, so what one trains the other loads."""
    ids = tokens(2, 20, vocab=258)
    transformers_model().save_pretrained(tmp_path / "base")
    native = from_pretrained(tmp_path / "base")
    targets = lora_targets(native)
    config = peft.LoraConfig(r=3, target_modules=list(targets.modules))
    wrapped = peft.PeftModel(native, config).eval()
    disturb_adapter(wrapped)
    assert coverage(wrapped).covered_blocks == 6
    wrapped.save_pretrained(tmp_path / "adapter")
    again = load_lora(hf.accelerate(transformers_model()), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected, logits = wrapped(input_ids=ids).logits, again(ids).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


def test_the_config_is_as_it_was():
    model = hf.accelerate(transformers_model())
    before = model.config.to_dict()
    wrapped = add_lora(model)
    assert model.config.model_type == wrapped.config.model_type == "nemotron_h"
    assert model.config.to_dict() == before and "model_type" not in vars(model.config)


def test_pefts_own_calls_take_out_proj_of_accelerated_models_and_of_no_others(tmp_path):
    out_proj = peft.LoraConfig(target_modules=["out_proj"], task_type="CAUSAL_LM")
    model = hf.accelerate(transformers_model())
    wrapped = add_lora(model)
    wrapped.add_adapter("second", lora_config(model, ["mamba"], r=2))
    assert any("out_proj.lora_A.second" in name for name, _ in wrapped.named_parameters())
    wrapped.save_pretrained(tmp_path, selected_adapters=["default"])
    wrapped.load_adapter(tmp_path, "third")
    wrapped.set_adapter("third")
    ids = tokens(2, 9, vocab=258)
    with torch.no_grad():
        expected = wrapped(ids).logits
        loaded = peft.PeftModel.from_pretrained(hf.accelerate(transformers_model()), tmp_path)
        assert torch.equal(loaded.eval()(ids).logits, expected)
    peft.get_peft_model(hf.accelerate(transformers_model()), out_proj)

    plain = transformers_model()
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(plain, out_proj)
    undone = hf.undo(hf.accelerate(transformers_model()))
    with pytest.raises(ValueError, match="out_proj"):
        peft.get_peft_model(undone, out_proj)
    with pytest.raises(ValueError, match="not accelerated"), projections_as_modules(plain):
        pass
    conv = peft.LoraConfig(target_modules=["conv1d"])
    with pytest.raises(ValueError, match="conv1d"):
        peft.get_peft_model(hf.accelerate(transformers_model()), conv)


def test_all_linear_is_every_projection_but_the_head():
    wrapped = add_lora(
        hf.accelerate(transformers_model()), peft.LoraConfig(target_modules="all-linear")
    )
    assert coverage(wrapped) == coverage(wrapped, lora_targets(wrapped), rank=8)


def test_what_cannot_be_is_refused_and_the_model_is_untouched():
    model = transformers_model()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"not accelerated: call nemotron_v3\.hf\.accelerate"):
        add_lora(model, lora_config(model))
    hf.accelerate(model)
    for config, message in (
        (peft.LoraConfig(target_modules=["q_proj", "gate_proj"]), "'gate_proj' matches nothing"),
        (peft.LoraConfig(target_modules=["out_poj"]), "did you mean 'out_proj'"),
        (peft.LoraConfig(), "no targets were given: the model has embeddings, in_proj"),
        (peft.LoraConfig(target_modules=["conv1d"]), "'conv1d' matches nothing"),
        (
            peft.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"]),
            "'experts.gate_up_proj' matches nothing",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(model, config)
    with pytest.raises(ValueError, match="no group 'experts'"):
        lora_config(model, ["experts"])
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "model_type" not in vars(model.config)
