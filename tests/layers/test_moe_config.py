"""Fields of a MoEConfig and of a backend that a mixture of experts obeys or refuses."""

import logging
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from nemotron_v3 import BackendConfig, NemotronV3ForCausalLM
from nemotron_v3.config import MoEConfig
from nemotron_v3.config.foreign import INERT_MOE_FIELDS
from nemotron_v3.layers import (
    ExpertLoad,
    NemotronV3Block,
    NemotronV3MoE,
    balance_,
    record_routing,
    replay_routing,
)
from nemotron_v3.layers.moe.even_router import EvenRouter, _say_once
from tests.models import disturb, tiny_config, tokens

FIELDS = {
    "dim": 48, "n_routed_experts": 8, "n_activated_experts": 3, "moe_inter_dim": 24,
    "route_scale": 2.5, "n_shared_experts": 1, "shared_expert_inter_dim": 32,
}  # fmt: skip
x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def moe(seed=0, backend=None, **changes):
    torch.manual_seed(seed)
    layer = NemotronV3MoE(MoEConfig(**FIELDS | changes), dtype=torch.float64, backend=backend)
    disturb(layer, torch.Generator().manual_seed(1))
    return layer


def by_hand(layer, x, weigh):
    """Token by token; `weigh(scores, biased, chosen)` gives the weights."""
    out = []
    for token in x.flatten(0, 1):
        scores = (layer.gate.weight @ token).sigmoid()
        biased = scores + layer.gate.e_score_correction_bias
        chosen = biased.topk(3).indices
        weights = weigh(scores, biased, chosen)
        up, down = layer.experts.up_proj, layer.experts.down_proj
        parts = [
            w * (down[e] @ (up[e] @ token).relu().square())
            for w, e in zip(weights, chosen, strict=True)
        ]
        out.append(sum(parts) + layer.shared_experts(token))
    return torch.stack(out).view(x.shape)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_weights_of_scores_with_or_without_the_bias(biased, norm):
    layer = moe(router_weight_uses_score_correction_bias=biased, norm_topk_prob=norm)

    def weigh(scores, with_bias, chosen):
        weights = (with_bias if biased else scores)[chosen]
        return 2.5 * (weights / weights.sum() if norm else weights)

    torch.testing.assert_close(layer(x), by_hand(layer, x, weigh))
    mine = torch.autograd.grad(layer(x).square().sum(), layer.gate.weight)
    theirs = torch.autograd.grad(by_hand(layer, x, weigh).square().sum(), layer.gate.weight)
    torch.testing.assert_close(mine, theirs)
    with record_routing(layer) as record:
        expected = layer(x)
    with replay_routing(layer, record):
        torch.testing.assert_close(layer(x), expected)


def test_without_a_bias_there_is_no_key_for_one():
    layer = moe(force_e_score_correction_bias=False)
    assert list(moe().state_dict()) != list(layer.state_dict())
    assert "gate.e_score_correction_bias" not in layer.state_dict()
    layer.gate.e_score_correction_bias.zero_()
    same = moe()
    same.load_state_dict(layer.state_dict(), strict=False)
    same.gate.e_score_correction_bias.zero_()
    assert torch.equal(layer(x), same(x))
    with ExpertLoad(layer, training_only=False) as load:
        layer(x)
        with pytest.raises(RuntimeError, match="force_e_score_correction_bias"):
            balance_(load, 1e-3)


def test_the_router_may_have_a_dtype_of_its_own():
    layer = NemotronV3MoE(MoEConfig(**FIELDS, dtype="bfloat16", gate_dtype="float32"))
    assert layer.gate.weight.dtype == torch.float32
    assert (
        layer.experts.up_proj.dtype == layer.shared_experts.up_proj.weight.dtype == torch.bfloat16
    )


@pytest.mark.parametrize("inner", [24, None])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_shared_experts_are_one_mlp_of_all_their_widths(count, inner):
    layer = moe(n_shared_experts=count, shared_expert_inter_dim=inner)
    if count == 0:
        assert layer.shared_experts is None
        assert not [name for name in layer.state_dict() if "shared" in name]
        whole = moe()
        whole.load_state_dict(layer.state_dict(), strict=False)
        torch.testing.assert_close(layer(x) + whole.shared_experts(x), whole(x))
        return
    assert layer.shared_experts.up_proj.weight.shape == (24 * count, 48)
    parts = [
        down @ (up @ x.mT).relu().square()
        for up, down in zip(
            layer.shared_experts.up_proj.weight.split(24),
            layer.shared_experts.down_proj.weight.split(24, 1),
            strict=True,
        )
    ]
    torch.testing.assert_close(layer.shared_experts(x), sum(parts).mT)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
def test_a_moe_config_decides_its_mixers_dtype(dtypes):
    of_model, of_moe = dtypes
    foreign = SimpleNamespace(**FIELDS, dtype=of_moe)
    block = NemotronV3Block(tiny_config(dtype=of_model), 1, foreign)
    expected = of_moe or of_model
    wide = ("gate.e_score_correction_bias",)
    kinds = {t.dtype for n, t in block.mixer.state_dict().items() if n not in wide}
    assert kinds == {expected}
    h = x.to(of_model)
    y = block(h)
    assert y.dtype == of_model
    torch.testing.assert_close(y, h + block.mixer(block.norm(h)).to(of_model))


def test_a_wider_mixture_leaves_the_stream_as_it_was():
    block = NemotronV3Block(
        tiny_config(dtype=torch.bfloat16), 1, MoEConfig(**FIELDS, dtype="float32")
    )
    assert block(x.bfloat16()).dtype == torch.bfloat16


# --- fields of other releases ---------------------------------------------------------------------


@dataclass
class Foreign:
    """A release with fields that nobody here knows."""

    dim: int = 48
    n_routed_experts: int = 8
    n_activated_experts: int = 3
    moe_inter_dim: int = 24
    swiglu_limit: float = 7.0
    router_weights_fp32: bool = True
    clip_router: float = 0.0
    names: list = field(default_factory=list)


def test_fields_that_change_nothing_are_taken():
    assert MoEConfig.from_any(Foreign()) == MoEConfig.from_any(Foreign(router_weights_fp32=False))
    told = dict.fromkeys(INERT_MOE_FIELDS, 3)
    assert MoEConfig.from_any(FIELDS | told) == MoEConfig(**FIELDS)
    assert MoEConfig.from_any(SimpleNamespace(**FIELDS, **told)) == MoEConfig(**FIELDS)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (Foreign(clip_router=0.5), "moe_config.clip_router is 0.5, and nothing here reads it"),
        (Foreign(names=["a"]), r"moe_config.names is \['a'\]"),
        (FIELDS | {"route_scales": 2.0}, "route_scales is 2.0.*did you mean route_scale"),
        (SimpleNamespace(**FIELDS, router_bias=True), "router_bias is True"),
        (SimpleNamespace(**FIELDS, enable_routing_replay=True), "record_routing"),
        (SimpleNamespace(**FIELDS, score_func="softmax"), "score_func is 'softmax'"),
    ],
)
def test_a_field_that_nothing_reads_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig.from_any(told)
    with pytest.raises(ValueError, match=message):
        NemotronV3Block(tiny_config(), 1, told)


# --- even routing for benchmarks ------------------------------------------------------------------

EVEN = BackendConfig(fake_balanced_gate=True)


def test_even_routing_spreads_real_tokens_in_turn():
    layer = moe(backend=EVEN)
    layer.gate.e_score_correction_bias[:3] += 100
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
    with record_routing(layer) as record, ExpertLoad(layer, training_only=False) as load:
        y = layer(x, mask)
    real = x[mask.bool()]  # [11, D]
    choices = torch.arange(11 * 3).view(11, 3) % 8
    assert torch.equal(record.indices["gate"][0], choices)
    counts = load.counts["gate"]
    assert counts.sum() == 33 and counts.max() - counts.min() <= 1
    up, down = layer.experts.up_proj, layer.experts.down_proj
    for token, experts, got in zip(real, choices, y[mask.bool()], strict=True):
        parts = [down[e] @ (up[e] @ token).relu().square() / 3 for e in experts]
        torch.testing.assert_close(got, sum(parts) + layer.shared_experts(token))


def test_an_even_router_keeps_its_parameters_frozen():
    layer, plain = moe(backend=EVEN), moe()
    assert list(layer.state_dict()) == list(plain.state_dict())
    assert [n for n, p in layer.named_parameters() if not p.requires_grad] == ["gate.weight"]
    layer(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters() if p.requires_grad)


def test_even_routing_says_so_once(caplog):
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING, "nemotron_v3"):
        moe(backend=EVEN), moe(backend=EVEN), moe()
    assert [r.message.split(":")[0] for r in caplog.records] == ["fake_balanced_gate"]


@pytest.mark.parametrize("kind", ["mamba", "attention", "mlp"])
def test_other_layers_do_not_look(kind):
    foreign = SimpleNamespace(fake_balanced_gate=True, fake_gate_noise=0.5)
    blocks = []
    for backend in (foreign, None):
        torch.manual_seed(0)
        blocks.append(NemotronV3Block(tiny_config(), 0, backend=backend, block_type=kind))
    assert torch.equal(*(block(x.float()) for block in blocks))
    with pytest.raises(ValueError, match="fake_gate_noise is 0.5"):
        NemotronV3Block(tiny_config(), 1, backend=foreign)


@torch.no_grad()
@pytest.mark.parametrize(
    "make",
    [lambda c: NemotronV3ForCausalLM(c, EVEN), NemotronV3ForCausalLM],
    ids=["even", "biased"],
)
def test_a_fast_decode_step_routes_as_the_router_does(make):
    """One pass over a sequence numbers its tokens, a step starts anew: compared step by step."""
    torch.manual_seed(0)
    model = make(tiny_config("ME*E")).eval()
    if not isinstance(model.model.layers[1].mixer.gate, EvenRouter):
        for block in (model.model.layers[1], model.model.layers[3]):
            config = MoEConfig(**FIELDS, router_weight_uses_score_correction_bias=True)
            block.mixer = NemotronV3MoE(config)
    disturb(model, torch.Generator().manual_seed(1))
    out = model.generate(tokens(1, 5), max_new_tokens=4, eos_token_id=[], return_logprobs=True)
    cache, fed, logprobs = None, out.sequences[:, :5], []
    for t in range(5, 9):
        step = model(fed, past_key_values=cache, use_cache=True)
        cache, fed = step.past_key_values, out.sequences[:, t : t + 1]
        logprobs.append(step.logits[:, -1].log_softmax(-1).gather(1, fed))
    torch.testing.assert_close(torch.cat(logprobs, 1), out.logprobs)
