"""Attention on a GPU at the shapes of Nemotron-3 Nano in bf16, beside PyTorch's own.

`varlen_attn` is PyTorch's kernel for packs (flash attention), `sdpa` what
`scaled_dot_product_attention` chooses for one document (cuDNN on a Hopper GPU). Times are between
CUDA events around calls; the floor is the products of the causal half at the rate of a large
product in the same run. Answers are held to the portable form in fp32 first.
"""

import inspect
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lengths import documents
from benchmarks.rates import event_time, product_rate
from benchmarks.table import Row, unavailable
from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout

H, J, P = 32, 2, 128
PACKS = {
    "64 x 128": [128] * 64,
    "64 documents, 8192": documents(8192, 64)(random.Random(0)),
    "4 documents, 8192": documents(8192, 4)(random.Random(0)),
    **{f"1 x {n}": [n] for n in (4096, 8192, 9000, 65_536, 131_072)},
}
CLOSE = 2e-2
VARLEN, SDPA = "varlen_attn", "sdpa"


def rows() -> Iterator[Row]:
    _check()
    for name, lengths in PACKS.items():
        leaves, dout = _drawn(lengths)
        layout = SequenceLayout.from_lengths(lengths, "cuda")
        ways = {
            "auto": lambda q, k, v, it=layout: ops.attention(q, k, v, layout=it),
            "kernels": lambda q, k, v, it=layout: ops.attention(q, k, v, layout=it, impl="triton"),
            VARLEN: _varlen(layout),
        }
        if len(lengths) == 1:
            ways[SDPA] = _sdpa
        floor = sum(2.0 * n * n * H * P for n in lengths) / product_rate()
        for what, factor in (("forward", 1), ("forward + backward", 3.5)):
            times: dict[str, float | str] = {}
            for way, run in ways.items():
                times[way] = _time(run, leaves, dout if factor > 1 else None)
            ours = times.pop("auto")
            yield Row(f"attention, {what}", name, "us", ours, times, False, factor * floor)


def _time(run: Any, leaves: list[Tensor], dout: Tensor | None) -> float | str:
    if run is None:
        return unavailable("not in this PyTorch")
    repeats = 5 if len(leaves[0]) > 50_000 else 20
    if dout is None:
        with torch.no_grad():
            return event_time(lambda: run(*leaves), repeats)
    return event_time(lambda: torch.autograd.grad(run(*leaves), leaves, dout), repeats)


def _drawn(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    T, kind = sum(lengths), {"device": "cuda", "dtype": torch.bfloat16}
    leaves = [torch.randn(T, heads, P, **kind).requires_grad_() for heads in (H, J, J)]
    return leaves, torch.randn(T, H, P, **kind)


def _varlen(layout: SequenceLayout) -> Callable[..., Tensor] | None:
    """PyTorch's `varlen_attn`, causal; 2.13 asks to be told of fewer key than query heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    offsets, longest = layout.cu_seqlens.to(torch.int32), max(layout.lengths)
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    return lambda q, k, v: varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads_first = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def _check() -> None:
    """What is measured against the portable form in fp32; raises where they differ."""
    lengths = [1, 300, 700, 23]
    (q, k, v), dout = _drawn(lengths)
    layout = SequenceLayout.from_lengths(lengths, "cuda")
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    true = ops.attention(*wide, layout=layout, impl="portable")
    expected = [true, *torch.autograd.grad(true, wide, dout.float())]
    ways = {"kernels": lambda *t: ops.attention(*t, layout=layout, impl="triton")}
    if (varlen := _varlen(layout)) is not None:
        ways[VARLEN] = varlen
    for name, run in ways.items():
        y = run(q, k, v)
        found = [y, *torch.autograd.grad(y, (q, k, v), dout)]
        for ours, theirs in zip(found, expected, strict=True):
            error = float((ours.float() - theirs).norm() / theirs.norm())
            assert error < CLOSE, f"{name}: a result is off by {error:.1e}"
