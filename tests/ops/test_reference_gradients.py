"""The gradients of the references: what the READMEs derive by hand, and numerical derivatives."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention.reference import attention
from nemotron_v3.ops.causal_conv1d.reference import causal_conv1d
from nemotron_v3.ops.cross_entropy.reference import cross_entropy
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
    expert_inputs,
    mamba2_inputs,
    randn,
    ssd_inputs,
)


@pytest.fixture
def layout() -> SequenceLayout:
    return SequenceLayout.from_lengths(LENGTHS)


def silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


def test_rms_norm_gradients_by_hand():
    x, weight, dy, eps = randn(7, 12, grad=True), randn(12, grad=True), randn(7, 12), 1e-2
    r = (x.square().mean(1, keepdim=True) + eps).rsqrt()
    g = weight * dy
    by_hand = {
        "x": r * (g - r**2 * x * (g * x).mean(1, keepdim=True)),
        "weight": (dy * r * x).sum(0),
    }
    assert_gradients(rms_norm(x, weight, eps), dy, {"x": x, "weight": weight}, by_hand)


def test_gated_rms_norm_gradients_by_hand():
    y, z, weight = randn(5, 12, grad=True), randn(5, 12, grad=True), randn(12, grad=True)
    grad_out, eps, group_size = randn(5, 12), 1e-2, 4
    v = y * F.silu(z)

    def mean(u: Tensor) -> Tensor:
        """Each channel's group mean."""
        return u.unflatten(1, (-1, group_size)).mean(2).repeat_interleave(group_size, 1)

    r = (mean(v**2) + eps).rsqrt()
    g = weight * grad_out
    dv = r * (g - r**2 * v * mean(g * v))
    by_hand = {
        "y": dv * F.silu(z),
        "z": dv * y * silu_slope(z),
        "weight": (grad_out * r * v).sum(0),
    }
    out = gated_rms_norm(y, z, weight, group_size, eps)
    assert_gradients(out, grad_out, {"y": y, "z": z, "weight": weight}, by_hand)


def test_conv_gradients_by_hand(layout):
    channels, width = 6, 4
    leaves = {
        "x": randn(layout.num_tokens, channels, grad=True),
        "weight": randn(channels, width, grad=True),
        "bias": randn(channels, grad=True),
        "initial_states": randn(layout.num_documents, channels, width, grad=True),
    }
    y, final = causal_conv1d(**leaves, layout=layout, return_final_states=True)
    dy, grad_final = torch.randn_like(y), torch.randn_like(final)
    weight, bias = leaves["weight"], leaves["bias"]
    by_hand = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    start = 0
    for document, length in enumerate(LENGTHS):
        u = torch.cat([leaves["initial_states"][document].T, leaves["x"][start : start + length]])
        du = torch.zeros_like(u)  # [W + length, C]
        du[length:] += grad_final[document].T
        for t in range(length):
            window = u[t + 1 : t + 1 + width].T
            p = (weight * window).sum(1) + bias
            dp = dy[start + t] * silu_slope(p)
            by_hand["weight"] += dp[:, None] * window
            by_hand["bias"] += dp
            du[t + 1 : t + 1 + width] += (dp[:, None] * weight).T
        by_hand["initial_states"][document] = du[:width].T
        by_hand["x"][start : start + length] = du[width:]
        start += length
    assert_gradients([y, final], [dy, grad_final], leaves, by_hand)


def test_ssd_gradients_by_hand(layout):
    """The adjoint recurrence of the README, backwards through each document."""
    low, high = 0.2, 1.5
    inputs = ssd_inputs(layout)
    y, final = ssd(**inputs, layout=layout, dt_limit=(low, high))
    dy, grad_final = torch.randn_like(y), torch.randn_like(final)
    x, A, D, S_0 = (inputs[name].detach() for name in ("x", "A", "D", "initial_states"))
    group = torch.arange(6) // 3
    B, C = inputs["B"].detach()[:, group], inputs["C"].detach()[:, group]
    raw = (inputs["dt"] + inputs["dt_bias"]).detach()
    dt = F.softplus(raw).clamp(low, high)
    a = torch.exp(dt * A)
    grads = {name: torch.zeros_like(leaf) for name, leaf in inputs.items()}
    start = 0
    for document, length in enumerate(LENGTHS):
        S = [S_0[document]]  # S[t + 1] is the state after token t
        for t in range(start, start + length):
            update = torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
            S.append(a[t][:, None, None] * S[-1] + update)
        R = grad_final[document]
        for t in reversed(range(start, start + length)):
            before, after = S[t - start], S[t - start + 1]
            R = R + torch.einsum("hp,hn->hpn", dy[t], C[t])
            RB = torch.einsum("hpn,hn->hp", R, B[t])
            da = (R * before).sum((1, 2)) * a[t]
            grads["x"][t] = dt[t][:, None] * RB + D[:, None] * dy[t]
            grads["dt"][t] = A * da + (x[t] * RB).sum(1)
            grads["A"] += dt[t] * da
            grads["D"] += (dy[t] * x[t]).sum(1)
            grads["B"][t].index_add_(0, group, torch.einsum("h,hpn,hp->hn", dt[t], R, x[t]))
            grads["C"][t].index_add_(0, group, torch.einsum("hpn,hp->hn", after, dy[t]))
            R = a[t][:, None, None] * R
        grads["initial_states"][document] = R
        start += length
    inside = (F.softplus(raw) > low) & (F.softplus(raw) < high)
    grads["dt"] *= torch.sigmoid(raw) * inside
    grads["dt_bias"] = grads["dt"].sum(0)
    assert_gradients([y, final], [dy, grad_final], inputs, grads)


def test_attention_gradients_by_hand(layout):
    q, k, v = (randn(layout.num_tokens, heads, 8, grad=True) for heads in (6, 2, 2))
    out = attention(q, k, v, layout=layout)
    grad_out = torch.randn_like(out)
    grads = {"q": torch.zeros_like(q), "k": torch.zeros_like(k), "v": torch.zeros_like(v)}
    scale, start = 8**-0.5, 0
    for length in LENGTHS:
        part = slice(start, start + length)
        for h in range(6):
            j = h // 3
            q_h, k_h, v_h, dO = q[part, h], k[part, j], v[part, j], grad_out[part, h]
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            P = torch.softmax((scale * q_h @ k_h.T).masked_fill(future, -math.inf), dim=1)
            dP = dO @ v_h.T
            dS = P * (dP - (dO * (P @ v_h)).sum(1, keepdim=True))
            grads["q"][part, h] = scale * dS @ k_h
            grads["k"][part, j] += scale * dS.T @ q_h
            grads["v"][part, j] += P.T @ dO
        start += length
    assert_gradients(out, grad_out, {"q": q, "k": k, "v": v}, grads)


@pytest.mark.parametrize("normalised", [True, False])
def test_router_gradients_by_hand(normalised):
    x, weight, bias, factor = randn(9, 10, grad=True), randn(8, 10, grad=True), randn(8), 2.5
    w, indices = router(x, weight, bias, top_k=3, norm_topk_prob=normalised, scaling_factor=factor)
    grad_w = torch.randn_like(w)
    s = torch.sigmoid(x @ weight.T).detach()
    s_k = s.gather(1, indices)
    if normalised:
        total = s_k.sum(1, keepdim=True) + 1e-20
        ds_k = factor / total * (grad_w - (grad_w * s_k / total).sum(1, keepdim=True))
    else:
        ds_k = factor * grad_w
    dl = torch.zeros_like(s).scatter(1, indices, ds_k) * s * (1 - s)
    by_hand = {"x": dl @ weight, "weight": dl.T @ x}
    assert_gradients(w, grad_w, {"x": x, "weight": weight}, by_hand)


def test_experts_gradients_by_hand():
    leaves, indices = expert_inputs()
    y = experts(**leaves, indices=indices)
    dy = torch.randn_like(y)
    x, w, up, down = (leaf.detach() for leaf in leaves.values())
    grads = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for t in range(9):
        for k, e in enumerate(indices[t].tolist()):
            u = up[e] @ x[t]
            r = u.relu()
            dr2 = down[e].T @ dy[t]
            du = w[t, k] * dr2 * 2 * r
            grads["weights"][t, k] = dr2 @ r**2
            grads["x"][t] += up[e].T @ du
            grads["up_proj"][e] += torch.outer(du, x[t])
            grads["down_proj"][e] += w[t, k] * torch.outer(dy[t], r**2)
    assert_gradients(y, dy, leaves, grads)
    assert torch.equal(grads["up_proj"][4], torch.zeros(7, 6, dtype=torch.float64))


def test_cross_entropy_gradient_by_hand():
    logits, targets = randn(9, 5, grad=True), torch.randint(5, (9,))
    targets[::3] = -100
    real = targets != -100
    one_hot = F.one_hot(targets.clamp(min=0), 5)
    grad = (torch.softmax(logits, 1) - one_hot) * real[:, None] / real.sum()
    loss = cross_entropy(logits, targets)
    assert_gradients(loss, 3 * torch.ones_like(loss), {"logits": logits}, {"logits": 3 * grad})


# --- every reference ----------------------------------------------------------------------

SMALL = SequenceLayout.from_lengths((1, 0, 3))


def small(name: str) -> tuple[dict[str, Tensor], partial]:
    """Leaves and a function of them, small enough for numerical derivatives."""
    if name == "rms_norm":
        return {"x": randn(3, 4), "weight": randn(4)}, partial(rms_norm, eps=1e-2)
    if name == "gated_rms_norm":
        leaves = {"y": randn(3, 4), "z": randn(3, 4), "weight": randn(4)}
        return leaves, partial(gated_rms_norm, group_size=2, eps=1e-2)
    if name == "causal_conv1d":
        leaves = {"x": randn(4, 2), "weight": randn(2, 3), "bias": randn(2)}
        leaves["initial_states"] = randn(3, 2, 3)
        return leaves, partial(causal_conv1d, layout=SMALL, return_final_states=True)
    if name == "ssd":
        return ssd_inputs(SMALL, 2, 2, 1, 2), partial(ssd, layout=SMALL)
    if name == "mamba2":
        leaves, sizes = mamba2_inputs(SMALL)
        return leaves, partial(mamba2, **sizes, layout=SMALL, eps=1e-2)
    if name == "attention":
        leaves = {"q": randn(4, 2, 3), "k": randn(4, 1, 3), "v": randn(4, 1, 3)}
        return leaves, partial(attention, layout=SMALL)
    if name == "router":
        leaves = {"x": randn(3, 4), "weight": randn(6, 4)}

        def weights(**leaves):
            return router(**leaves, bias=5 * torch.arange(6.0), top_k=2, scaling_factor=2.5)[0]

        return leaves, partial(weights)
    if name == "experts":
        leaves, indices = expert_inputs()
        return leaves, partial(experts, indices=indices)
    leaves = {"logits": randn(4, 5)}
    return leaves, partial(cross_entropy, targets=torch.tensor([1, -100, 4, 0]))


EVERY = [
    "rms_norm",
    "gated_rms_norm",
    "causal_conv1d",
    "ssd",
    "mamba2",
    "attention",
    "router",
    "experts",
    "cross_entropy",
]


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_numerical_derivatives(name):
    leaves, function = small(name)
    values = [leaf.detach().requires_grad_() for leaf in leaves.values()]
    assert torch.autograd.gradcheck(
        lambda *values: function(**dict(zip(leaves, values, strict=True))), values
    )


@pytest.mark.parametrize("name", EVERY)
def test_results_are_fp64_whatever_comes_in(name):
    """And so is the arithmetic: bf16 inputs give what their fp64 copies give."""
    leaves, function = small(name)
    narrow = {k: leaf.detach().bfloat16() for k, leaf in leaves.items()}
    wide = {k: leaf.double() for k, leaf in narrow.items()}
    for results in zip(*map(as_tuple, (function(**narrow), function(**wide))), strict=True):
        assert results[0].dtype == torch.float64
        assert_equal(*results)


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
