"""An AutoModel model before, while and after this package computes it."""

import copy
import io
import pickle

import pytest
import torch
from nemo_automodel.components.models.common import BackendConfig
from nemo_automodel.components.models.nemotron_v3 import layers as theirs
from nemo_automodel.components.models.nemotron_v3.model import NemotronHForCausalLM
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.moe.layers import MLP, Gate, MoE
from torch import nn

from nemotron_v3 import nemo
from nemotron_v3.nemo.classes import SETTINGS, Accelerated
from tests.models import tokens
from tests.nemo.models import BACKEND, tensors, their_backend, their_config, their_model

NO_SCAN = ("moe", "attention", "mlp", "moe")  # what theirs computes on a CPU


@pytest.fixture
def own_classes():
    yield
    nemo.disable()


def test_names_tensors_and_classes_stay():
    model = their_model()
    before = {name: type(module) for name, module in model.named_modules()}
    state, hook = tensors(model), model.model.layers["0"].register_forward_hook(lambda *_: None)
    assert nemo.accelerate(model) is model
    assert {k: v.data_ptr() for k, v in model.state_dict().items()}.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for name, module in model.named_modules():
        assert isinstance(module, before[name])
        assert type(module).__name__ == before[name].__name__
        assert type(module).__module__ == before[name].__module__
    changed = {type(m).__name__ for m in model.modules() if isinstance(m, Accelerated)}
    assert changed == {
        "NemotronHForCausalLM", "NemotronV3Model", "NemotronV3Block", "NemotronV3Attention",
        "NemotronV3Mamba2Mixer", "NemotronV3MambaRMSNormGated", "MLP", "Gate", "GroupedExperts",
    }  # fmt: skip
    assert hook.id in model.model.layers["0"]._forward_hooks


def test_undo_gives_the_numbers_of_theirs_back_bit_for_bit():
    model = their_model(NO_SCAN)
    ids = tokens(2, 9)
    before = model(ids, labels=ids)
    classes = [type(module) for module in model.modules()]
    with_ours = nemo.accelerate(model)(ids, labels=ids)
    assert nemo.is_accelerated(model)
    after = nemo.undo(model)(ids, labels=ids)
    assert torch.equal(after.logits, before.logits) and torch.equal(after.loss, before.loss)
    torch.testing.assert_close(with_ours.logits, before.logits)
    assert [type(module) for module in model.modules()] == classes
    assert not nemo.is_accelerated(model)
    assert not any(SETTINGS in vars(module) for module in model.modules())
    with pytest.raises(ValueError, match="nothing to undo"):
        nemo.undo(model)


def test_a_part_of_a_model_or_what_holds_one_is_taken():
    model = their_model(NO_SCAN)
    nemo.accelerate(model.model.layers["0"])
    assert isinstance(model.model.layers["0"].mixer.gate, Accelerated)
    assert not isinstance(model.model.layers["1"], Accelerated)
    nemo.undo(model)
    holder = nn.ModuleDict({"policy": model})
    assert nemo.is_accelerated(nemo.accelerate(holder).policy.model)


def test_layers_that_other_models_have_too_are_left_outside_a_block():
    """Another AutoModel model beside ours keeps its router, its experts and its MLP."""
    other = MLP(8, 16, "torch", dtype=torch.float32, activation="relu2")
    both = nn.ModuleList([their_model(NO_SCAN), other])
    nemo.accelerate(both)
    assert type(other) is MLP and type(both[0].model.layers["2"].mixer) is not MLP


def test_it_is_refused_twice_and_says_how_to_change_it():
    model = nemo.accelerate(their_model(NO_SCAN))
    with pytest.raises(ValueError, match="accelerated already: call nemotron_v3.nemo.undo"):
        nemo.accelerate(model, impl="reference")
    assert model.model.layers["0"].impl == "auto"


def test_a_class_or_forward_of_its_own_is_refused_and_nothing_changes():
    class Loud(theirs.NemotronV3Attention):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    model = their_model(NO_SCAN)
    model.model.layers["1"].mixer.__class__ = Loud
    with pytest.raises(TypeError, match="Loud computes something of its own"):
        nemo.accelerate(model)
    model.model.layers["1"].mixer.__class__ = theirs.NemotronV3Attention
    model.model.layers["1"].mixer.forward = lambda *a, **k: None
    with pytest.raises(ValueError, match="forward of a .*NemotronV3Attention has been replaced"):
        nemo.accelerate(model)
    assert not nemo.is_accelerated(model)


def test_a_subclass_without_a_forward_of_its_own_stays_one():
    class Named(theirs.NemotronV3Attention):
        def told(self):
            return "named"

    model = their_model(NO_SCAN)
    layer = model.model.layers["1"].mixer
    layer.__class__ = Named
    nemo.accelerate(model)
    assert isinstance(layer, Named) and layer.told() == "named" and isinstance(layer, Accelerated)
    nemo.undo(model)
    assert type(layer) is Named


def test_a_copy_and_a_pickle_are_accelerated_too():
    model = nemo.accelerate(their_model(NO_SCAN).eval())
    ids = tokens(1, 7)
    file = io.BytesIO()
    torch.save(model.model.layers["0"], file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model.model.layers["0"]),
        pickle.loads(pickle.dumps(model.model.layers["0"])),
        torch.load(file, weights_only=False),
    ):
        x = model.model.embed_tokens(ids)
        assert torch.equal(copied(x), model.model.layers["0"](x))
        assert isinstance(copied.mixer.gate, Accelerated) and isinstance(copied.mixer.gate, Gate)
        assert type(nemo.undo(copied).mixer.experts) is GroupedExperts


def test_what_is_built_after_enable_is_accelerated(own_classes):
    nemo.enable(impl="portable")
    model = their_model(NO_SCAN)
    assert nemo.is_accelerated(model) and model.impl == "portable"
    nemo.enable()  # a second call changes the form, and wraps nothing twice
    assert their_model(NO_SCAN).impl == "auto"
    nemo.disable()
    assert not nemo.is_accelerated(their_model(NO_SCAN))
    nemo.disable()
    assert nemo.is_accelerated(model)


def test_a_model_without_values_is_built_accelerated_and_filled(own_classes):
    nemo.enable()
    with torch.device("meta"):
        model = NemotronHForCausalLM(their_config(), their_backend())
    source = nemo.undo(their_model())
    model.load_state_dict(source.state_dict(), assign=True)
    ids = tokens(1, 5)
    assert torch.equal(model(ids).logits, nemo.accelerate(source)(ids).logits)


def test_the_line_of_a_recipe_enables_and_gives_their_backend(own_classes):
    made = nemo.backend(**BACKEND)
    assert type(made) is BackendConfig and made.attn == "sdpa"
    assert nemo.is_accelerated(NemotronHForCausalLM(their_config(NO_SCAN), made))
    nemo.disable()
    with pytest.raises(TypeError, match="unexpected keyword argument 'attention'"):
        nemo.backend(attention="sdpa")
    assert not nemo.is_accelerated(their_model(NO_SCAN))  # nothing before the error


def test_sublayers_of_multi_token_prediction_come_along():
    changes = {"num_nextn_predict_layers": 2, "mtp_layers_block_type": ["attention", "moe"]}
    plain = their_model(NO_SCAN, **changes).train()
    ours = nemo.accelerate(copy.deepcopy(plain))
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    expected, found = plain(ids, attention_mask=mask), ours(ids, attention_mask=mask)
    assert len(found.mtp_per_depth_h) == 2
    for a, b in zip(found.mtp_per_depth_h, expected.mtp_per_depth_h, strict=True):
        torch.testing.assert_close(a, b)
    assert all(isinstance(layer, Accelerated) for layer in ours.mtp.layers)
    assert isinstance(ours.model.layers["0"].mlp, MoE)
