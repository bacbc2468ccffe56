"""Attention in blocks of keys, joined by the logarithms of their sums, against the reference."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.cached_attention import reference
from nemotron_v3.ops.common import attention_blocks as blocks
from nemotron_v3.ops.common.attention_blocks import Block


def qkv(n: int, m: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    shapes = [(n, 6, 16), (m + n, 2, 16), (m + n, 2, 16)]
    return [torch.randn(*s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("cuts", [(), (30,), (4, 5, 29)])
def test_blocks_join_to_the_whole_with_all_gradients(cuts, scale, monkeypatch):
    n, m = 9, 31
    starts = (0, *cuts, m)
    cut = [Block(a, b, is_causal=False) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    monkeypatch.setattr(blocks, "blocks_of", lambda n, keys: (*cut, Block(m, m + n, True)))
    tensors = qkv(n, m)
    weights = torch.randn(n, 6, 16, dtype=torch.float64)
    y = blocks.attend_after(*tensors, scale)
    found = (y, *torch.autograd.grad(y, tensors, weights))
    q, k, v = tensors
    held = torch.tensor([m])
    where = {"layout": SequenceLayout.from_lengths([n]), "starts": (m,), "positions": held}
    y = reference.cached_attention(
        q, *(t.transpose(0, 1)[None] for t in (k, v)), **where, scale=scale
    )
    wanted = (y, *torch.autograd.grad(y, tensors, weights))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_scores_far_from_each_other_do_not_overflow():
    q, k, v = qkv(3, 5)
    y = blocks.attend_after(q * 1e3, k * 1e3, v)
    (dq, dk, dv) = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(bool(t.isfinite().all()) for t in (y, dq, dk, dv))


def test_a_long_chunk_behind_a_prompt_makes_no_mask_on_a_cpu(monkeypatch):
    q, k, v = (t.detach() for t in qkv(8, 20))
    seen = []
    whole = blocks.attend_after
    monkeypatch.setattr(blocks, "attend_after", lambda *a: (seen.append(1), whole(*a))[1])
    where = {"layout": SequenceLayout.from_lengths([8]), "starts": (20,)}
    keys, values = (t.transpose(0, 1)[None] for t in (k, v))
    y = ops.cached_attention(q, keys, values, **where, positions=torch.tensor([20]))
    wanted = reference.cached_attention(q, keys, values, **where, positions=torch.tensor([20]))
    torch.testing.assert_close(y, wanted)
    assert seen
