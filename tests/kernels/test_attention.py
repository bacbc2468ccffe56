"""Attention's kernels in Triton's interpreter: caches, borders, other documents, compilers."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import cases
from tests.accuracy import relative_error
from tests.kernels.holding import results

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

STARTS, NEW = (5, 70, 0, 40), (36, 0, 0, 33)  # two rows get nothing, one of which holds keys


def cached(impl: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Output and gradients of pieces behind a cache that has more room than they need."""
    generator = torch.Generator().manual_seed(0)
    rows, J, H, P = len(NEW), 2, 6, 16
    needed = max(a + b for a, b in zip(STARTS, NEW, strict=True))
    buffers = [torch.randn(rows, J, needed + 7, P, generator=generator) for _ in range(2)]
    q = torch.randn(sum(NEW), H, P, generator=generator)
    leaves = [t.to(dtype).requires_grad_() for t in (q, *buffers)]
    y = ops.cached_attention(
        leaves[0],
        *(t[:, :, :needed] for t in leaves[1:]),
        layout=SequenceLayout.from_lengths(list(NEW)),
        starts=STARTS,
        positions=torch.tensor(STARTS),
        impl=impl,
    )
    dy = torch.randn(y.shape, generator=generator).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def test_pieces_behind_a_cache():
    """Forward and all gradients: no further from the truth than twice the portable form."""
    true = cached("reference", torch.float64)
    plain, ours = cached("portable"), cached("triton")
    for exact, theirs, mine in zip(true, plain, ours, strict=True):
        assert relative_error(mine, exact) <= 2 * relative_error(theirs, exact) + 2**-24


def inputs(lengths: tuple[int, ...]) -> cases.Inputs:
    case = cases.Case("pack", lengths, 4, 2, 16)
    return cases.make_inputs(case, torch.float32, "cpu", torch.Generator().manual_seed(0))


def test_a_document_does_not_feel_its_neighbours():
    """Bit by bit, outputs and gradients: beside NaN, beside others, or alone."""
    drawn = inputs((40, 33, 1))
    before = results("attention", drawn)
    for tensor in drawn.tensors.values():
        tensor[:40] = torch.nan
    beside_nan = results("attention", drawn)
    assert all(torch.equal(a[40:], b[40:]) for a, b in zip(before, beside_nan, strict=True))

    alone = SequenceLayout.from_lengths([33])
    kept = [t[40:73].clone() for t in drawn.tensors.values()]
    y = ops.attention(*kept, layout=alone, impl="triton")
    assert torch.equal(y, before[0][40:73])


def test_a_token_does_not_see_later_ones():
    drawn = inputs((70,))
    before = results("attention", drawn)[0]
    for name in ("k", "v"):
        drawn.tensors[name][50] += 1.0
    after = results("attention", drawn)[0]
    assert torch.equal(before[:50], after[:50])
    assert not torch.equal(before[50], after[50])


def test_a_compiler_sees_one_graph():
    drawn = inputs((20, 1, 13))

    def run(q, k, v):
        return ops.attention(q, k, v, **drawn.options, impl="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    leaves = [t.requires_grad_() for t in drawn.tensors.values()]
    dy = torch.randn_like(run(*leaves))
    found = [torch.autograd.grad(f(*leaves), leaves, dy) for f in (run, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.ones(1, 1, 3, 3, dtype=torch.bool)}, "4-D attention_mask"),
        ({"dropout_p": 0.1}, "attention_dropout is 0.1"),
        ({"scale": -1.0}, "scale of the scores is -1.0"),
    ],
)
def test_what_kernels_cannot_do_is_refused(changes, message):
    drawn = inputs((3,))
    options = drawn.options | changes
    with pytest.raises(RuntimeError, match=message):
        ops.attention(**drawn.tensors, **options, impl="triton")
