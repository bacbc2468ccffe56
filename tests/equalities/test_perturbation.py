"""What one document holds never reaches another, and what comes later never reaches what was
before: for every op, forms and gradients, bit for bit; hypothesis draws the layouts.

The shapes of all matrix products stay what they are, since only values change. That is why the
answer can be "exactly", also for experts, whose tiles have a fixed number of rows.
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron_v3 import NemotronV3ForCausalLM, SequenceLayout, ops
from tests.accuracy import document_lengths
from tests.models import tiny_model, tokens


@dataclass(frozen=True)
class Op:
    """Which case of the op's cases.py; its tensors with a row a token, and those with one a
    document; how many of its outputs have a row a token (the others have one a document)."""

    case: str
    by_token: tuple[str, ...]
    by_document: tuple[str, ...] = ()
    outputs: int = 1


OPS = {
    "rms_norm": Op("odd-width", ("x",)),
    "gated_rms_norm": Op("odd-groups", ("y", "z")),
    "causal_conv1d": Op("pack", ("x",), ("initial_states",)),
    "ssd": Op("small-chunks", ("x", "dt", "B", "C"), ("initial_states",)),
    "mamba2": Op("pack", ("zxbcdt",), ("conv_states", "ssm_states")),
    "attention": Op("pack", ("q", "k", "v")),
    "router": Op("grouped", ("x",), outputs=2),
    "experts": Op("idle-experts", ("x", "weights", "indices")),
}


def draw_inputs(name: str, lengths: tuple[int, ...], seed: int) -> dict[str, Any]:
    """The op's arguments for documents of these lengths."""
    cases = import_module(f"nemotron_v3.ops.{name}.cases")
    case = next(case for case in cases.CASES if case.name == OPS[name].case)
    sizes = {"lengths": lengths} if hasattr(case, "lengths") else {"tokens": sum(lengths)}
    generator = torch.Generator().manual_seed(seed)
    inputs = cases.make_inputs(replace(case, **sizes), torch.float32, "cpu", generator)
    return inputs.tensors | inputs.options


def splice(name: str, a: dict, b: dict, tokens: slice, documents: list[int]) -> dict[str, Any]:
    """`a`, with `b`'s values at some tokens and documents."""
    mixed = dict(a)
    for places, names in ((tokens, OPS[name].by_token), (documents, OPS[name].by_document)):
        for key in names:
            mixed[key] = a[key].clone()
            mixed[key][places] = b[key][places]
    return mixed


def run(name: str, arguments: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What has a row a token (outputs, gradients), and what has a row a document."""
    op = OPS[name]
    leaves = {
        key: arguments[key].detach().clone().requires_grad_()
        for key in (*op.by_token, *op.by_document)
        if arguments[key].is_floating_point()
    }
    outputs = getattr(ops, name)(**(arguments | leaves), impl="portable")
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    kept = [y for y in outputs if y.is_floating_point()]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator) for y in kept]
    gradients = dict(
        zip(leaves, torch.autograd.grad(kept, list(leaves.values()), cotangents), strict=True)
    )
    n = op.outputs
    by_token = [*outputs[:n], *(gradients[key] for key in op.by_token if key in gradients)]
    return by_token, [*outputs[n:], *(gradients[key] for key in op.by_document)]


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=12)
@given(data=st.data())
def test_another_documents_values_change_nothing(name, data):
    lengths = data.draw(document_lengths(conv_width=3, chunk_size=8))
    lengths = (*lengths, 5)  # at least two documents
    changed = data.draw(st.integers(0, len(lengths) - 1))
    start = sum(lengths[:changed])
    span = slice(start, start + lengths[changed])
    a, b = (draw_inputs(name, lengths, seed) for seed in (0, 1))
    before, after = run(name, a), run(name, splice(name, a, b, span, [changed]))
    others = torch.ones(sum(lengths), dtype=torch.bool)
    others[span] = False
    for x, y in zip(before[0], after[0], strict=True):
        assert torch.equal(x[others], y[others])
    rows = [d for d in range(len(lengths)) if d != changed]
    for x, y in zip(before[1], after[1], strict=True):
        assert torch.equal(x[rows], y[rows])
    # And it was a change: outputs of the document itself are others.
    assert not torch.equal(before[0][0][span], after[0][0][span])


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=8)
@given(data=st.data())
def test_later_tokens_change_nothing_before_them(name, data):
    lengths = data.draw(document_lengths(conv_width=3, chunk_size=8))
    T = sum(lengths)
    t = data.draw(st.integers(0, T - 1))
    a, b = (draw_inputs(name, lengths, seed) for seed in (0, 1))
    before, _ = run(name, a)
    after, _ = run(name, splice(name, a, b, slice(t, T), []))
    n = OPS[name].outputs
    for x, y in zip(before[:n], after[:n], strict=True):
        assert torch.equal(x[:t], y[:t])


def test_the_gradient_of_the_loss_is_each_tokens_own():
    logits, targets = torch.randn(40, 97), tokens(40)
    other = logits.clone()
    other[10:20] = torch.randn(10, 97)
    gradients = []
    for values in (logits, other):
        values.requires_grad_()
        ops.cross_entropy(values, targets).backward()
        gradients.append(values.grad)
    same = [t for t in range(40) if not 10 <= t < 20]
    assert torch.equal(gradients[0][same], gradients[1][same])


# --- whole models with experts ------------------------------------------------------------------


def logits_and_gradients(
    model: NemotronV3ForCausalLM, embeds: Tensor, layout: SequenceLayout
) -> tuple[Tensor, Tensor]:
    embeds = embeds.detach().requires_grad_()
    logits = model(inputs_embeds=embeds, layout=layout).logits
    logits.square().mean().backward()
    return logits.detach(), embeds.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"moe_latent_size": 32}], ids=["plain", "latent"])
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_model_with_experts_leaves_other_documents_exactly_alone(dtype, changes, seed):
    """The other document's tokens go to other experts, so every expert has other rows."""
    lengths = [3, 17, 1, 40, 5]
    model = tiny_model(**changes).to(dtype)
    layout = SequenceLayout.from_lengths(lengths)
    a, b = (model.model.embeddings(tokens(sum(lengths), seed=s)) for s in (0, seed))
    mixed = a.clone()
    mixed[3:20] = b[3:20]
    (y, grad), (z, other) = (logits_and_gradients(model, x, layout) for x in (a, mixed))
    same = [t for t in range(sum(lengths)) if not 3 <= t < 20]
    assert torch.equal(y[same], z[same])
    assert torch.equal(grad[same], other[same])
    assert not torch.equal(y, z)
