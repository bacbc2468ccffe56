"""The references against independent facts: PyTorch's built-ins, closed forms, definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention.reference import attention
from nemotron_v3.ops.causal_conv1d.reference import causal_conv1d
from nemotron_v3.ops.cross_entropy.reference import cross_entropy, shift_labels
from nemotron_v3.ops.experts.reference import experts
from nemotron_v3.ops.gated_rms_norm.reference import gated_rms_norm
from nemotron_v3.ops.mamba2.reference import mamba2
from nemotron_v3.ops.rms_norm.reference import rms_norm
from nemotron_v3.ops.router.reference import router
from nemotron_v3.ops.ssd.reference import ssd
from tests.ops.reference_inputs import (
    LENGTHS,
    assert_equal,
    assert_gradients,
    documents,
    expert_inputs,
    mamba2_inputs,
    randn,
    ssd_inputs,
)


@pytest.fixture
def layout() -> SequenceLayout:
    return SequenceLayout.from_lengths(LENGTHS)


# --- norms ------------------------------------------------------------------------------------


def test_rms_norm_is_torchs():
    x, weight = randn(7, 12), randn(12)
    assert_equal(rms_norm(x, weight, 1e-3), F.rms_norm(x, (12,), weight, 1e-3))


@pytest.mark.parametrize("gate", [True, False])
def test_gated_rms_norm_gates_first_and_norms_each_group(gate):
    y, z, weight = randn(5, 12), randn(5, 12) if gate else None, randn(12)
    v = y * F.silu(z) if gate else y
    groups = zip(v.split(4, 1), weight.split(4), strict=True)
    expected = torch.cat([F.rms_norm(v_g, (4,), w_g, 1e-3) for v_g, w_g in groups], dim=1)
    assert_equal(gated_rms_norm(y, z, weight, 4, 1e-3), expected)


# --- convolution ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("activation", ["silu", None])
def test_conv_is_torchs_on_each_document_after_its_state(layout, width, activation):
    x, weight, bias = randn(layout.num_tokens, 6), randn(6, width), randn(6)
    states = randn(layout.num_documents, 6, width)
    y, final = causal_conv1d(
        x,
        weight,
        bias,
        layout=layout,
        activation=activation,
        initial_states=states,
        return_final_states=True,
    )
    for document, (x_d, y_d) in enumerate(zip(documents(x), documents(y), strict=True)):
        history = torch.cat([states[document], x_d.T], dim=1)  # [C, W + length]
        assert torch.equal(final[document], history[:, -width:])
        if len(x_d):
            full = F.conv1d(history[None], weight[:, None], bias, groups=6)[0].T[1:]
            assert_equal(y_d, F.silu(full) if activation else full)


def test_conv_starts_from_zeros(layout):
    x, weight = randn(layout.num_tokens, 6), randn(6, 4)
    y, final = causal_conv1d(x, weight, None, layout=layout)
    assert final is None
    zeros = torch.zeros(layout.num_documents, 6, 4, dtype=torch.float64)
    assert torch.equal(y, causal_conv1d(x, weight, None, layout=layout, initial_states=zeros)[0])


# --- the state space --------------------------------------------------------------------------


def ssd_as_attention(x, dt, A, B, C, D, dt_bias, initial_states, lengths):
    """The dual form: masked attention with decays for weights, no recurrence.

    `y_t = D x_t + exp(a_t) S_0 C_t + sum_{s <= t} (C_t . B_s) exp(a_t - a_s) dt_s x_s` with
    `a_t = A (dt_1 + ... + dt_t)`.
    """
    per_group = x.shape[1] // B.shape[1]
    group = torch.arange(x.shape[1]) // per_group  # the group that each head reads
    dt = torch.log1p(torch.exp(dt + dt_bias))
    outputs, finals = [], []
    for document, (x_d, dt_d, B_d, C_d) in enumerate(
        zip(*(documents(u, lengths) for u in (x, dt, B[:, group], C[:, group])), strict=True)
    ):
        S_0 = initial_states[document]
        if len(x_d) == 0:
            finals.append(S_0)
            continue
        a = (A * dt_d).cumsum(0)  # [L, H]
        decay = torch.exp(a[:, None] - a[None]).permute(2, 0, 1).tril()  # [H, t, s]
        scores = torch.einsum("thn,shn->hts", C_d, B_d) * decay
        y = torch.einsum("hts,sh,shp->thp", scores, dt_d, x_d)
        y = y + torch.einsum("th,hpn,thn->thp", torch.exp(a), S_0, C_d)
        outputs.append(y + D[:, None] * x_d)
        to_end = torch.exp(a[-1] - a) * dt_d
        update = torch.einsum("sh,shp,shn->hpn", to_end, x_d, B_d)
        finals.append(torch.exp(a[-1])[:, None, None] * S_0 + update)
    return torch.cat(outputs), torch.stack(finals)


def test_ssd_is_its_dual_quadratic_form_with_its_gradients(layout):
    inputs = ssd_inputs(layout)
    y, final = ssd(**inputs, layout=layout)
    dual_y, dual_final = ssd_as_attention(**inputs, lengths=LENGTHS)
    assert_equal(y, dual_y)
    assert_equal(final, dual_final)
    cotangents = [torch.randn_like(y), torch.randn_like(final)]
    dual = torch.autograd.grad([dual_y, dual_final], list(inputs.values()), cotangents)
    by_dual = dict(zip(inputs, dual, strict=True))
    assert_gradients([y, final], cotangents, inputs, by_dual)


def test_ssd_without_decay_is_a_cumulative_sum(layout):
    inputs = {k: v.detach() for k, v in ssd_inputs(layout, groups=6).items()}
    inputs["A"] = torch.zeros(6, dtype=torch.float64)
    inputs["D"] = inputs["dt_bias"] = inputs["initial_states"] = None
    y, final = ssd(**inputs, layout=layout)
    update = torch.einsum("th,thp,thn->thpn", F.softplus(inputs["dt"]), inputs["x"], inputs["B"])
    states = [u.cumsum(0) for u in documents(update)]
    assert_equal(y, torch.einsum("thpn,thn->thp", torch.cat(states), inputs["C"]))
    assert_equal(final, torch.stack([u.sum(0) for u in documents(update)]))


def test_ssd_of_one_token_by_its_equation():
    layout = SequenceLayout.from_lengths((1,))
    inputs = {k: v.detach() for k, v in ssd_inputs(layout, heads=2, groups=1).items()}
    y, final = ssd(**inputs, layout=layout)
    for h in range(2):
        dt = math.log1p(math.exp(inputs["dt"][0, h] + inputs["dt_bias"][h]))
        x, B, C = inputs["x"][0, h], inputs["B"][0, 0], inputs["C"][0, 0]
        S_0 = inputs["initial_states"][0, h]
        S = math.exp(dt * inputs["A"][h]) * S_0 + dt * torch.outer(x, B)
        assert_equal(final[0, h], S)
        assert_equal(y[0, h], S @ C + inputs["D"][h] * x)


def test_ssd_heads_of_a_group_are_neighbours(layout):
    inputs = ssd_inputs(layout)
    repeated = dict(inputs)
    for name in ("B", "C"):
        first, second = inputs[name][:, :1], inputs[name][:, 1:]
        repeated[name] = torch.cat([first] * 3 + [second] * 3, dim=1)  # 6 heads, 2 groups
    for got, expected in zip(
        ssd(**inputs, layout=layout), ssd(**repeated, layout=layout), strict=True
    ):
        assert torch.equal(got, expected)


def test_ssd_in_pieces_is_ssd_in_one():
    whole = SequenceLayout.from_lengths((11,))
    inputs = ssd_inputs(whole)
    y, final = ssd(**inputs, layout=whole)
    state, pieces, start = inputs["initial_states"], [], 0
    for length in (1, 0, 7, 3):
        piece = dict(inputs, initial_states=state)
        for name in ("x", "dt", "B", "C"):
            piece[name] = inputs[name][start : start + length]
        y_piece, state = ssd(**piece, layout=SequenceLayout.from_lengths((length,)))
        pieces.append(y_piece)
        start += length
    assert_equal(torch.cat(pieces), y)
    assert_equal(state, final)


def test_ssd_clamps_the_step_after_softplus(layout):
    inputs = ssd_inputs(layout)
    low, high = 0.3, 0.6
    y, final = ssd(**inputs, layout=layout, dt_limit=(low, high))
    step = F.softplus(inputs["dt"] + inputs["dt_bias"]).clamp(low, high)
    # The same steps, reached through a softplus that no limit touches.
    free = dict(inputs, dt=step + torch.log(-torch.expm1(-step)), dt_bias=None)
    free_y, free_final = ssd(**free, layout=layout)
    assert_equal(y, free_y)
    assert_equal(final, free_final)


# --- the mixer's core -------------------------------------------------------------------------


def test_mamba2_out_of_torchs_parts_and_the_dual_form(layout):
    """`z | x | B | C | dt` cut by hand; conv1d, the quadratic form and rms_norm in between."""
    tensors, sizes = mamba2_inputs(layout)
    y, conv_final, ssm_final = mamba2(**tensors, **sizes, layout=layout, eps=1e-3)
    zxbcdt = tensors["zxbcdt"]
    z, xBC, dt = zxbcdt[:, :12], zxbcdt[:, 12:44], zxbcdt[:, 44:]
    convolved = []
    for document, x_d in enumerate(documents(xBC)):
        history = torch.cat([tensors["conv_states"][document], x_d.T], dim=1)
        assert torch.equal(conv_final[document], history[:, -4:])
        if len(x_d):
            weight = tensors["conv_weight"][:, None]
            out = F.conv1d(history[None], weight, tensors["conv_bias"], groups=32)
            convolved.append(F.silu(out[0].T[1:]))
    xBC = torch.cat(convolved)
    ssm_y, expected_final = ssd_as_attention(
        xBC[:, :12].reshape(-1, 4, 3),
        dt,
        -torch.exp(tensors["A_log"]),
        xBC[:, 12:22].reshape(-1, 2, 5),
        xBC[:, 22:].reshape(-1, 2, 5),
        tensors["D"],
        tensors["dt_bias"],
        tensors["ssm_states"],
        LENGTHS,
    )
    v = (ssm_y.reshape(-1, 12) * F.silu(z)).reshape(-1, 2, 6)
    expected = F.rms_norm(v, (6,), eps=1e-3).reshape(-1, 12) * tensors["norm_weight"]
    assert_equal(y, expected)
    assert_equal(ssm_final, expected_final)


# --- attention --------------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """PyTorch's attention on `[S, heads, P]`."""
    q, k, v = (u.transpose(0, 1)[None] for u in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention_is_torchs_on_each_document(layout, scale):
    q, k, v = (randn(layout.num_tokens, heads, 8) for heads in (6, 2, 2))
    expected = [
        sdpa(*parts, is_causal=True, scale=scale)
        for parts in zip(*map(documents, (q, k, v)), strict=True)
        if len(parts[0])
    ]
    assert_equal(attention(q, k, v, layout=layout, scale=scale), torch.cat(expected))


@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("heads", [1, 6])
def test_attention_obeys_a_mask_alone(kind, heads):
    layout = SequenceLayout.plain(2, 7)
    q, k, v = (randn(14, n, 8) for n in (6, 2, 2))
    mask = torch.rand(2, heads, 7, 7) < 0.5
    mask[..., 0] = True
    if kind == "additive":
        mask = randn(2, heads, 7, 7).masked_fill(~mask, -math.inf)
    out = attention(q, k, v, layout=layout, mask=mask)
    for row in range(2):
        part = slice(7 * row, 7 * row + 7)
        expected = sdpa(q[part], k[part], v[part], attn_mask=mask[row][None])
        assert_equal(out[part], expected)


def test_a_token_that_may_attend_to_nothing_gives_zero_and_takes_no_gradient():
    layout = SequenceLayout.from_padding_mask(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]))
    q, k, v = (randn(6, n, 8, grad=True) for n in (4, 2, 2))
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    mask = (causal & torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]).bool()[:, None, :])[:, None]
    mask[0, 0, 2] = False  # packed token 0
    out = attention(q, k, v, layout=layout, mask=mask)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert torch.equal(gradients[0][0], torch.zeros_like(q[0]))
    assert_equal(out[1:2], sdpa(q[1:2], k[:2], v[:2]))
    assert_equal(out[2:], sdpa(q[2:], k[2:], v[2:], is_causal=True))


def test_attention_drops_weights_without_changing_their_mean():
    layout = SequenceLayout.from_lengths((3,))
    q, k, v = randn(3, 2, 4), randn(3, 2, 4), randn(3, 2, 4)
    kept = attention(q, k, v, layout=layout)
    dropped = torch.stack([attention(q, k, v, layout=layout, dropout_p=0.5) for _ in range(2000)])
    spread = dropped.std(0) / math.sqrt(len(dropped))
    assert ((dropped.mean(0) - kept).abs() < 5 * spread).all()


# --- mixture of experts -----------------------------------------------------------------------


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (4, 1)])
@pytest.mark.parametrize("centre", [0.0, -5.0])
def test_router_picks_by_its_definition(n_group, topk_group, centre):
    """Expert by expert in plain Python; with every biased score negative too."""
    x, weight, bias = randn(9, 10), randn(16, 10), randn(16) + centre
    weights, indices = router(
        x, weight, bias, top_k=3, n_group=n_group, topk_group=topk_group, scaling_factor=2.5
    )
    size = 16 // n_group
    for t in range(9):
        scores = [1 / (1 + math.exp(-float(weight[e] @ x[t]))) for e in range(16)]
        choice = [s + float(b) for s, b in zip(scores, bias, strict=True)]
        value = {g: sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)}
        kept = sorted(value, key=value.get, reverse=True)[:topk_group]
        allowed = [e for e in range(16) if e // size in kept]
        best = sorted(allowed, key=lambda e: choice[e], reverse=True)[:3]
        assert indices[t].tolist() == best
        total = sum(scores[e] for e in best)
        expected = torch.tensor([2.5 * scores[e] / total for e in best], dtype=torch.float64)
        assert_equal(weights[t], expected)


def test_router_gives_ties_to_the_lower_index():
    x, weight, bias = torch.zeros(2, 4), torch.zeros(8, 4), torch.zeros(8)
    bias[5] = 1.0
    weights, indices = router(x, weight, bias, top_k=3, norm_topk_prob=False)
    assert indices.tolist() == [[5, 0, 1]] * 2
    assert torch.equal(weights, torch.full((2, 3), 0.5, dtype=torch.float64))
    grouped = router(x, weight, torch.zeros(8), top_k=3, n_group=4, topk_group=2)[1]
    assert grouped.tolist() == [[0, 1, 2]] * 2


def test_experts_are_every_expert_weighted():
    leaves, indices = expert_inputs()
    every = torch.einsum("efx,tx->tef", leaves["up_proj"], leaves["x"]).relu().square()
    every = torch.einsum("exf,tef->tex", leaves["down_proj"], every)
    weights = torch.zeros(9, 5, dtype=torch.float64).scatter_add(1, indices, leaves["weights"])
    assert_equal(experts(**leaves, indices=indices), torch.einsum("te,tex->tx", weights, every))


# --- loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-100, -1, 2])
def test_cross_entropy_is_torchs(ignore_index):
    logits, targets = 30 * randn(9, 5), torch.randint(5, (9,))
    targets[::3] = ignore_index
    expected = F.cross_entropy(logits, targets, ignore_index=ignore_index)
    assert_equal(cross_entropy(logits, targets, ignore_index=ignore_index), expected)


def test_cross_entropy_without_targets_is_zero_with_zero_gradients():
    logits = randn(4, 5, grad=True)
    loss = cross_entropy(logits, torch.full((4,), -100))
    assert loss == 0.0
    (grad,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, torch.zeros_like(logits))


def test_labels_are_shifted_inside_documents():
    layout = SequenceLayout.from_padding_mask(torch.tensor([[0, 1, 1, 1], [1, 0, 0, 0]]))
    labels = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]])
    assert shift_labels(labels, layout).tolist() == [12, 13, -100, -100]
    packed = SequenceLayout.from_lengths((2, 0, 1, 3))
    assert shift_labels(torch.arange(6), packed).tolist() == [1, -100, -100, 4, 5, -100]
