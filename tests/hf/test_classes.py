"""What `accelerate` takes beside transformers' own causal model: backbones, heads, modules around
them, and classes that another library has made of transformers'."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import NemotronHConfig
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3 import BackendConfig, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.hf import (
    NemotronHForSequenceClassification,
    NemotronHForTokenClassification,
    accelerate,
    is_accelerated,
    report,
    undo,
)
from nemotron_v3.hf.layers import NemotronHMamba2Mixer
from nemotron_v3.hf.peft import add_lora
from tests.hf.models import by_the_rule, close, gradients, tokens, transformers_model

SETTINGS = {"pad_token_id": 0, "num_labels": 3}


class Sequences(GenericForSequenceClassification, theirs.NemotronHPreTrainedModel):
    """As transformers makes such heads."""


class Tokens(GenericForTokenClassification, theirs.NemotronHPreTrainedModel):
    pass


class Pooled(nn.Module):
    """A classifier of one's own."""

    def __init__(self, config):
        super().__init__()
        self.backbone = theirs.NemotronHModel(config)
        self.head = nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids):
        return self.head(self.backbone(input_ids).last_hidden_state[:, -1])


class Mixin:
    def greeting(self):
        return f"hello from {type(self).__name__}"


class Mixed(Mixin, theirs.NemotronHForCausalLM):
    def greeting(self):
        return super().greeting() + "!"


class MixedBlock(Mixin, theirs.NemotronHBlock):
    pass


def config():
    """A fresh one: a model of transformers writes into its config."""
    return NemotronHConfig.from_dict(transformers_model(**SETTINGS).config.to_dict())


def made(kind):
    """With every weight off its initial value."""
    torch.manual_seed(0)
    model = kind(config()).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def output(model, ids):
    out = model(ids)
    if isinstance(out, torch.Tensor):
        return out
    return out.get("logits", out.get("last_hidden_state"))


def mixers_are_ours(model):
    mixers = [m for m in model.modules() if isinstance(m, theirs.NemotronHMamba2Mixer)]
    return bool(mixers) and all(isinstance(m, NemotronHMamba2Mixer) for m in mixers)


@pytest.mark.parametrize("kind", [theirs.NemotronHModel, Sequences, Tokens, Pooled, Mixed])
def test_output_and_gradients_are_transformers(kind):
    plain = made(kind)
    model, truth = copy.deepcopy(plain), copy.deepcopy(plain).double()
    accelerate(truth, backend=BackendConfig(impl="reference"))
    assert not is_accelerated(model)
    assert accelerate(model) is model
    assert is_accelerated(model) and mixers_are_ours(model)
    assert any(row.computes == "mamba2" for row in report(model).rows)

    def draws():
        for seed in range(6):
            ids = 1 + tokens(2, 40, vocab=90, seed=seed)
            results = {}
            for who, each in {"ours": model, "theirs": plain, "truth": truth}.items():
                each.zero_grad()
                out = output(each, ids)
                out.square().sum().backward()
                results[who] = {"logits": out.detach(), **gradients(each)}
            assert close(results["ours"]["logits"], results["theirs"]["logits"])
            yield results

    by_the_rule(draws(), torch.float32)


@pytest.mark.parametrize("kind", [theirs.NemotronHModel, Sequences, Pooled, Mixed])
def test_undo_gives_every_class_back(kind):
    model = made(kind)
    kinds = [type(m) for m in model.modules()]
    held = [vars(m).keys() for m in model.modules()]
    ids = 1 + tokens(2, 20, vocab=90)
    expected = output(model, ids)
    undo(accelerate(model))
    assert [type(m) for m in model.modules()] == kinds
    assert [vars(m).keys() for m in model.modules()] == held
    assert torch.equal(output(model, ids), expected) and not is_accelerated(model)


def test_a_mixin_stays_and_copies_have_it():
    model = accelerate(made(Mixed))
    ids = tokens(1, 20)
    expected = model(ids).logits
    assert type(model).__name__ == "Mixed" and isinstance(model, Mixed)
    assert "computed by nemotron_v3" in repr(model)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and is_accelerated(other)
        assert other.greeting() == "hello from Mixed!"
        assert torch.equal(other(ids).logits, expected)
    assert type(undo(copy.deepcopy(model))) is Mixed


def test_a_class_made_of_the_models_own_name():
    """As libraries do that add methods to a model which is there already."""
    model = made(theirs.NemotronHForCausalLM)
    kind = type(model)
    model.__class__ = type(kind.__name__, (Mixin, kind), {"__module__": kind.__module__})
    ids = tokens(1, 20)
    expected = model(ids).logits
    assert close(accelerate(model)(ids).logits, expected)
    assert model.greeting() == "hello from NemotronHForCausalLM"


def test_a_block_that_inherits_its_forward_is_checkpointed_still():
    """transformers puts a wrapper of the inherited forward on every class of blocks."""
    plain = transformers_model().train()
    mixed = copy.deepcopy(plain)
    for block in mixed.model.layers:
        block.__class__ = MixedBlock
    accelerate(mixed)
    accelerate(plain)
    seen = []
    mixed.model.layers[0].norm.register_forward_hook(lambda *_: seen.append(1))
    ids = tokens(1, 20)
    for model in (plain, mixed):
        model.gradient_checkpointing_enable()
        model(input_ids=ids, labels=ids).loss.backward()
    assert len(seen) == 2  # once more for the backward
    expected = gradients(plain)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(mixed).items())
    assert {type(block) for block in undo(mixed).model.layers} == {MixedBlock}


def refused(model, message, error=TypeError, **options):
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        accelerate(model, **options)
    assert [type(m) for m in model.modules()] == kinds and not is_accelerated(model)


def test_what_would_be_lost_is_named():
    model = transformers_model()

    class Louder(theirs.NemotronHForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Called(theirs.NemotronHForCausalLM):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Step(theirs.NemotronHMoE):
        """Another step of transformers' forward."""

        def route_tokens_to_experts(self, *args):
            raise NotImplementedError

    class Sharded(FSDPModule, theirs.NemotronHForCausalLM):
        pass

    for kind, message in [
        (Louder, "Louder is a subclass.* the forward of .*Louder computes"),
        (Called, "the __call__ of .*Called computes"),
        (Sharded, "Sharded has torch.distributed.fsdp.*FSDPModule among its bases"),
    ]:
        other = copy.deepcopy(model)
        other.__class__ = kind
        refused(other, message)
    if hasattr(theirs.NemotronHMoE, "route_tokens_to_experts"):
        model.model.layers[1].mixer.__class__ = Step
        refused(model, "the route_tokens_to_experts of .*Step computes")


def test_a_loss_over_the_vocabulary_needs_its_head():
    for kind in (theirs.NemotronHModel, Sequences):
        refused(made(kind), "loss='linear' is for a Nemotron", ValueError, loss="linear")


def test_two_backbones_are_refused():
    two = nn.ModuleList([transformers_model(), made(theirs.NemotronHModel)])
    refused(two, "2 language models")


@pytest.mark.parametrize(
    ("ours", "plain"),
    [(NemotronHForSequenceClassification, Sequences), (NemotronHForTokenClassification, Tokens)],
)
def test_a_head_from_a_language_models_checkpoint(tmp_path, ours, plain):
    transformers_model(**SETTINGS).save_pretrained(tmp_path / "base")
    model = ours.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    wide = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert {"A_log", "D", "dt_bias"} <= wide and model.score.weight.dtype == torch.bfloat16
    model = ours.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    assert is_accelerated(model) and mixers_are_ours(model)
    assert mixers_are_ours(ours(model.config))  # which says which experts transformers would use
    model.save_pretrained(tmp_path / "head")
    ids = 1 + tokens(2, 20, vocab=90)
    expected = model(ids).logits
    for kind in (ours, plain):
        again = kind.from_pretrained(tmp_path / "head", dtype=torch.float32).eval()
        assert close(again(ids).logits, expected)
    assert close(undo(model)(ids).logits, expected) and not is_accelerated(model)


@pytest.mark.parametrize("kind", [NemotronHForSequenceClassification, "backbone"])
def test_a_state_dict_in_the_spelling_of_files(tmp_path, kind):
    """What a Trainer that resumes hands over; a backbone alone has no prefix in its files."""
    from safetensors.torch import load_file

    model = made(kind) if kind != "backbone" else accelerate(made(theirs.NemotronHModel))
    model.save_pretrained(tmp_path)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_our_own_model_is_told_from_transformers():
    own = NemotronV3ForCausalLM(
        NemotronV3Config(layers_block_type="M*", vocab_size=20, hidden_size=32)
    )
    for call in (accelerate, add_lora):
        with pytest.raises((TypeError, ValueError), match="AutoModelForCausalLM.from_pretrained"):
            call(own)
