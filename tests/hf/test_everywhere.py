"""Copies of a model that somebody else builds: every way in which a class is looked up."""

import importlib
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    NemotronHConfig,
)
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _LazyAutoMapping
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3 import BackendConfig, hf
from nemotron_v3.hf.layers import NemotronHMamba2Mixer
from nemotron_v3.hf.peft import add_lora
from tests.hf.models import close, tokens, transformers_model

MODULE = theirs.__name__
PlainCausal, PlainBackbone = theirs.NemotronHForCausalLM, theirs.NemotronHModel  # held since before


class Subclass(PlainCausal):
    """Without a forward of its own."""


class Louder(PlainCausal):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 2 * out.logits
        return out


def by_name(where, name):
    return lambda path: getattr(importlib.import_module(where), name).from_pretrained(path)


def trl_by_path(path):
    utils = pytest.importorskip("trl.trainer.utils")
    return utils.create_model_from_path(path)


LOOKUPS = {
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
    "AutoModelForTokenClassification": AutoModelForTokenClassification.from_pretrained,
    "from_config": lambda path: AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)),
    "their config": lambda path: AutoModel.from_config(NemotronHConfig.from_pretrained(path)),
    "transformers.NemotronHForCausalLM": by_name("transformers", "NemotronHForCausalLM"),
    "transformers.NemotronHModel": by_name("transformers", "NemotronHModel"),
    "its package": by_name("transformers.models.nemotron_h", "NemotronHForCausalLM"),
    "its module": by_name(MODULE, "NemotronHForCausalLM"),
    "a class held before": PlainCausal.from_pretrained,
    "a backbone's class held before": PlainBackbone.from_pretrained,
    "a subclass": Subclass.from_pretrained,
    "a subclass with its own forward": Louder.from_pretrained,
    "TRL by path": trl_by_path,
}


def changed_by_register():
    """Every object that anything of transformers or PEFT could be found by, by its place."""
    found = {("config", key): value for key, value in CONFIG_MAPPING._extra_content.items()}
    for name, mapping in vars(modeling_auto).items():
        if isinstance(mapping, _LazyAutoMapping):
            found |= {(name, key): value for key, value in mapping._extra_content.items()}
    owners = [transformers, theirs, importlib.import_module("transformers.models.nemotron_h")]
    owners += [PlainCausal, PlainBackbone, theirs.NemotronHPreTrainedModel, AutoConfig, AutoModel]
    owners += [importlib.import_module("peft.tuners.tuners_utils")]
    for owner in owners:
        found |= {(owner, name): value for name, value in list(vars(owner).items())}
    return {key: id(value) for key, value in found.items()}


def ours(model):
    mixers = [m for m in model.modules() if isinstance(m, theirs.NemotronHMamba2Mixer)]
    return bool(mixers) and all(isinstance(m, NemotronHMamba2Mixer) for m in mixers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    transformers_model(pad_token_id=0).save_pretrained(path)
    return path


@pytest.fixture
def everything():
    hf.accelerate(everything=True)
    yield
    hf.undo(everything=True)


@pytest.mark.parametrize("look_up", LOOKUPS.values(), ids=LOOKUPS)
def test_every_way_to_a_class_gives_an_accelerated_model(checkpoint, everything, look_up):
    model = look_up(checkpoint)
    assert hf.is_accelerated(model) and ours(model)
    ids = 1 + tokens(1, 15, vocab=90)
    model.eval()(ids)


@pytest.mark.parametrize("look_up", LOOKUPS.values(), ids=LOOKUPS)
def test_and_undone_it_is_what_it_was(checkpoint, look_up):
    before = changed_by_register()
    hf.register()
    hf.register(loss="linear")  # twice is once
    assert changed_by_register() != before
    hf.unregister()
    hf.unregister()
    assert changed_by_register() == before
    try:
        model = look_up(checkpoint)
    except ValueError as error:  # transformers has no such head
        assert "Unrecognized configuration class" in str(error)
    else:
        assert not hf.is_accelerated(model) and not ours(model)


def test_models_built_so_compute_what_accelerated_ones_do(checkpoint, everything):
    ids = 1 + tokens(2, 15, vocab=90)
    built = PlainCausal.from_pretrained(checkpoint)
    assert type(built) is hf.NemotronHForCausalLM
    assert type(PlainBackbone.from_pretrained(checkpoint)) is hf.NemotronHModel
    expected = built(ids).logits
    assert torch.equal(Subclass.from_pretrained(checkpoint)(ids).logits, expected)
    assert torch.equal(Louder.from_pretrained(checkpoint)(ids).logits, 2 * expected)
    hf.undo(everything=True)
    plain = PlainCausal.from_pretrained(checkpoint)
    assert type(plain) is PlainCausal and close(plain(ids).logits, expected)
    assert hf.is_accelerated(built)  # what was built stays


def test_what_is_fp32_for_a_reason_is_kept_whoever_builds(checkpoint, everything):
    for build in (PlainCausal, Subclass, Louder, PlainBackbone, AutoModel):
        model = build.from_pretrained(checkpoint, dtype="bfloat16")
        wide = {
            n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32
        }
        assert {"A_log", "D", "dt_bias"} <= wide
        assert model.get_input_embeddings().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "auto", torch.bfloat16])
def test_a_dtype_by_name(checkpoint, everything, dtype):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)
    expected = torch.float32 if dtype == "auto" else dtype
    expected = getattr(torch, expected) if isinstance(expected, str) else expected
    assert model.lm_head.weight.dtype == expected


def test_options_are_those_of_what_is_built(checkpoint):
    hf.accelerate(everything=True, backend=BackendConfig(impl="reference"), loss="linear")
    try:
        models = [PlainCausal.from_pretrained(checkpoint), AutoModel.from_pretrained(checkpoint)]
        assert {m.settings.backend.impl for m in models} == {"reference"}
        assert [m.settings.loss for m in models] == ["linear", "logits"]
        hf.register()
        assert PlainCausal.from_pretrained(checkpoint).settings.loss == "logits"
    finally:
        hf.undo(everything=True)
    assert hf.NemotronHForCausalLM.from_pretrained(checkpoint).settings.backend.impl == "auto"


def test_options_are_checked_before_anything_is_changed():
    before = changed_by_register()
    with pytest.raises(ValueError, match="loss='fast'"):
        hf.register(loss="fast")
    model = transformers_model()
    with pytest.raises(ValueError, match="loss='fast'"):
        hf.accelerate(model, everything=True, loss="fast")
    with pytest.raises(TypeError, match="give one, or everything=True"):
        hf.accelerate()
    with pytest.raises(TypeError, match="give one, or everything=True"):
        hf.undo()
    assert changed_by_register() == before and not hf.is_accelerated(model)


def test_a_model_and_everything_at_once(checkpoint):
    model = PlainCausal.from_pretrained(checkpoint)
    assert hf.accelerate(model, everything=True) is model and hf.is_accelerated(model)
    assert hf.is_accelerated(PlainCausal.from_pretrained(checkpoint))
    hf.undo(model, everything=True)
    assert not hf.is_accelerated(model)
    assert not hf.is_accelerated(PlainCausal.from_pretrained(checkpoint))


def test_one_accelerated_model_reaches_no_other(checkpoint):
    hf.accelerate(PlainCausal.from_pretrained(checkpoint))
    assert not hf.is_accelerated(PlainCausal.from_pretrained(checkpoint))


def test_what_another_library_has_put_on_top_stays(checkpoint):
    before = PlainCausal.__init__
    hf.register()
    wrapped = PlainCausal.__init__

    def on_top(self, *args, **kwargs):
        wrapped(self, *args, **kwargs)
        self.noticed = True

    PlainCausal.__init__ = on_top
    try:
        assert hf.is_accelerated(PlainCausal.from_pretrained(checkpoint))
        hf.unregister()
        assert PlainCausal.__init__ is on_top
        model = PlainCausal.from_pretrained(checkpoint)
        assert model.noticed and not hf.is_accelerated(model)
    finally:
        PlainCausal.__init__ = before


def test_a_backbone_that_stays_plain_is_no_secret(everything):
    class Own(PlainBackbone):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    config = transformers_model().config
    with pytest.warns(UserWarning, match="it stays transformers' own.*Own"):
        Own(config)


def test_adapters_are_loaded_by_path(checkpoint, everything, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = add_lora(PlainCausal.from_pretrained(checkpoint))
    adapted.add_adapter("second", adapted.peft_config["default"])
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path, selected_adapters=["default"])
    ids = 1 + tokens(1, 12, vocab=90)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert hf.is_accelerated(again) and any("out_proj" in n for n, _ in again.named_parameters())
    assert close(again.eval()(ids).logits, adapted.eval()(ids).logits)
    hf.undo(everything=True)
    with pytest.raises(ValueError, match="out_proj"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)


def test_who_imported_transformers_before_finds_the_heads_too():
    """It puts another module of its name in its place when it imports a model."""
    kind = type(transformers)
    first = kind("transformers", transformers.__file__, {}, module_spec=transformers.__spec__)
    module = type(pytest)("holds_the_first_transformers")
    module.theirs = first
    sys.modules[module.__name__] = module
    try:
        hf.register()
        head = first.NemotronHForSequenceClassification
        assert head is transformers.NemotronHForSequenceClassification
        hf.unregister()
        assert "NemotronHForSequenceClassification" not in vars(first)
    finally:
        hf.unregister()
        del sys.modules[module.__name__]
