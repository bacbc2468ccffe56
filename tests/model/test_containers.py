"""What users do to a model besides calling it: cast, copy, save, autocast, determinism."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3 import BackendConfig, NemotronV3ForCausalLM, SequenceLayout
from tests.accuracy import relative_error
from tests.model.test_against_transformers import ours_of, transformers_model
from tests.models import WITHOUT_MOE, tiny_config, tiny_model, tokens

IDS = tokens(2, 40)


def results(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(IDS, labels=IDS)
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_is_as_right_as_its_dtype(dtype):
    """`.half()` and `.to(bf16)` against fp64, by the accuracy rule with transformers as the peer.

    Each project is held to its own weights after the cast: theirs rounds A_log and its like too.
    Without experts: a rounding chooses others where two scores are close.
    """
    theirs = transformers_model(layers_block_type=["mamba", "attention", "mlp", "mamba"])
    ours = ours_of(theirs)
    errors = []
    for model in (ours.to(dtype), theirs.to(dtype)):
        truth = ours_of(model, BackendConfig(impl="reference")).double()
        errors.append(relative_error(model(IDS).logits, truth(IDS).logits))
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps / 2


def test_double_is_further_from_float_than_from_itself():
    single, double = tiny_model(), tiny_model().double()
    a, b = results(single), results(double)
    assert {t.dtype for t in b.values()} == {torch.float64}
    worst = max(relative_error(a[name], b[name]) for name in a)
    assert 1e-9 < worst < 1e-4
    again = results(tiny_model().double())
    assert_same(b, again)


def test_casting_there_and_back_loses_nothing_of_the_fp32_tensors():
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.half().float()
    for name, tensor in model.state_dict().items():
        kept = name.rsplit(".", 1)[-1] in ("A_log", "D", "dt_bias", "e_score_correction_bias")
        expected = before[name] if kept else before[name].half().float()
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_with_fp32_gradients_near_those_of_fp32(dtype):
    # Without experts: a token that rounding sends elsewhere is no rounding error.
    with torch.autocast("cpu", dtype):
        out = (model := tiny_model(WITHOUT_MOE))(IDS, labels=IDS)
    out.loss.backward()
    narrow = tiny_model(WITHOUT_MOE).to(dtype)
    narrow(IDS, labels=IDS).loss.backward()
    truth = results(tiny_model(WITHOUT_MOE).double())
    names = dict(model.named_parameters())
    assert {p.grad.dtype for p in names.values()} == {torch.float32}

    def error(parameters):
        pairs = [(p.grad.flatten(), truth[n].flatten()) for n, p in parameters]
        measured, true = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
        return relative_error(measured, true)

    allowed = 2 * error(narrow.named_parameters()) + torch.finfo(dtype).eps / 2
    assert error(names.items()) <= allowed


class Products(TorchDispatchMode):
    """The dtypes of matrix products' operands, by kind of product."""

    def __init__(self):
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.seen |= {a.dtype for a in args if isinstance(a, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_autocast_reaches_projections_and_experts_but_not_the_scan():
    kinds = {}
    for block_type in ("mamba", "attention", "mlp", "moe"):
        block = tiny_model().model.layers[("mamba", "moe", "attention", "mlp").index(block_type)]
        assert block.block_type == block_type
        products = Products()
        with torch.autocast("cpu", torch.bfloat16), products, torch.no_grad():
            block(torch.randn(1, 40, 48))
        kinds[block_type] = products.seen
    both = {torch.bfloat16, torch.float32}
    assert kinds == {
        "mamba": both,  # projections, and the scan's own products
        "attention": {torch.bfloat16},
        "mlp": {torch.bfloat16},
        "moe": both,  # experts, and the router
    }


def test_a_copy_is_the_same_model_and_shares_nothing():
    model = tiny_model(tie_word_embeddings=True)
    copied = copy.deepcopy(model)
    assert_same(results(model), results(copied))
    with torch.no_grad():
        for tensor in [*copied.parameters(), *copied.buffers()]:
            tensor.zero_()
    assert not torch.equal(model(IDS).logits, copied(IDS).logits)
    assert_same(results(model), results(tiny_model(tie_word_embeddings=True)))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True, "moe_latent_size": 28}])
def test_a_saved_state_dict_gives_the_same_model_back(changes):
    model = tiny_model(**changes).bfloat16()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        other = NemotronV3ForCausalLM(tiny_config(**changes))
    other.load_state_dict(torch.load(file, weights_only=True), assign=True)
    assert_same(results(model), results(other))
    assert dict(model.state_dict()).keys() == dict(other.state_dict()).keys()


def test_a_whole_model_can_be_pickled():
    model = tiny_model()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert_same(results(model), results(torch.load(file, weights_only=False)))


@pytest.mark.parametrize("layout", [None, SequenceLayout.from_lengths([5, 1, 30, 44])])
def test_inputs_embeds_stand_for_tokens_and_pass_their_gradient_on(layout):
    ids = IDS if layout is None else IDS.flatten()
    model = tiny_model()
    embeds = model.model.embeddings(ids).detach().requires_grad_()
    by_embeds = model(inputs_embeds=embeds, labels=ids, layout=layout)
    by_embeds.loss.backward()
    others = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    by_ids = model(ids, labels=ids, layout=layout)
    by_ids.loss.backward()
    assert torch.equal(by_embeds.logits, by_ids.logits)
    gradients = {n: p.grad for n, p in model.named_parameters()}
    table = torch.zeros_like(gradients["model.embeddings.weight"])
    table.index_add_(0, ids.flatten(), embeds.grad.flatten(0, -2))
    torch.testing.assert_close(gradients.pop("model.embeddings.weight"), table)
    assert_same(others, gradients)


def test_deterministic_algorithms_are_all_that_is_needed_and_change_nothing():
    """Nothing of the model raises under the switch, and it repeats itself bit for bit anyway."""
    expected = results(tiny_model())
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(results(tiny_model()), expected)
        model = tiny_model()
        model.gradient_checkpointing_enable()
        assert_same(results(model), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_tied_head_follows_replaced_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    old = model.model.embeddings
    model.model.embeddings = torch.nn.Embedding(*old.weight.shape)
    assert model.lm_head.weight is model.model.embeddings.weight
