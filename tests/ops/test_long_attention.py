"""Attention at fixed sizes: which documents, which sizes, and the same numbers."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import cases, portable, reference
from nemotron_v3.ops.common import long_attention as long
from tests.accuracy import PlainPyTorch, check


def test_sizes_are_few_and_close():
    lengths = range(1, 70_000)
    sizes = [long.fixed_size(n) for n in lengths]
    assert all(n <= size <= n * 1.125 for n, size in zip(lengths, sizes, strict=True))
    of_octave = {size for size in sizes if 8192 < size <= 16_384}
    assert len(of_octave) == long.SIZES_OF_OCTAVE and 16_384 in of_octave


@pytest.mark.parametrize("lengths", [(129,), (1, 3, 40, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_accuracy(lengths, dtype):
    case = cases.Case("fixed", lengths, 4, 2, 16)
    check(
        lambda **given: long.attention(**given),
        reference.attention,
        lambda generator: cases.make_inputs(case, dtype, "cpu", generator),
        dtype=dtype,
        plain=PlainPyTorch(reference.attention, dtype),
    )


def test_what_stands_behind_a_document_is_seen_by_nobody():
    q, k, v = (torch.randn(21, heads, 8) for heads in (4, 2, 2))
    layout = SequenceLayout.from_lengths([21])
    alone = portable.attention(q, k, v, layout=layout)
    assert torch.allclose(long.attend(q, k, v), alone, atol=1e-6)


def test_long_documents_are_apart(monkeypatch):
    monkeypatch.setattr(long, "LONG", 8)
    layout = SequenceLayout.from_lengths([3, 8, 0, 2, 9, 10])
    runs = long.runs(layout)
    assert [(r.first, r.end, r.is_long) for r in runs] == [
        (0, 1, False),
        (1, 2, True),
        (2, 4, False),
        (4, 5, True),
        (5, 6, True),
    ]
    assert [r.layout.lengths for r in runs] == [(3,), (8,), (0, 2), (9,), (10,)]
    assert runs[2].layout.cu_seqlens.tolist() == [0, 0, 2]
    assert long.runs(SequenceLayout.from_lengths([3, 7])) is None


@pytest.mark.parametrize("lengths", [[3, 8, 1, 9], [11]], ids=str)
def test_the_op_joins_them(monkeypatch, lengths):
    """As on a GPU in 16 bits: forward and gradients of a pack with long documents in it."""
    case = cases.Case("joined", tuple(lengths), 4, 2, 8)
    inputs = cases.make_inputs(case, torch.float64, "cpu", torch.Generator().manual_seed(0))
    leaves = [t.requires_grad_() for t in inputs.tensors.values()]
    whole = ops.attention(*leaves, **inputs.options, impl="portable")
    dy = torch.randn_like(whole)
    expected = [whole, *torch.autograd.grad(whole, leaves, dy)]
    monkeypatch.setattr(long, "LONG", 8)
    monkeypatch.setattr(long, "takes", lambda q: True)
    seen = []
    attend = long.attend
    monkeypatch.setattr(long, "attend", lambda q, *a: seen.append(len(q)) or attend(q, *a))
    joined = ops.attention(*leaves, **inputs.options, impl="portable")
    found = [joined, *torch.autograd.grad(joined, leaves, dy)]
    assert [n for n in seen if n in lengths and n >= 8] == [n for n in lengths if n >= 8]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-13 * b.norm()


def test_the_same_gradients_in_each_run_where_pytorch_is_asked_for_them():
    class OnGpu:
        dtype, is_cuda = torch.bfloat16, True

    assert long.takes(OnGpu()) and not long.takes(torch.zeros(1))
    torch.use_deterministic_algorithms(True)
    try:
        assert not long.takes(OnGpu())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lengths", [[3, 5, 3, 7], [4, 4], [6]], ids=str)
def test_a_compiler_sees_one_graph_of_a_pack(lengths):
    """Documents of any lengths, the layout made outside: nothing is read back on the way."""

    def run(q, k, v, layout):
        return ops.attention(q, k, v, layout=layout, impl="portable")

    torch._dynamo.reset()
    layout = SequenceLayout.from_lengths(lengths)
    given = [torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given, layout), run(*given, layout))
