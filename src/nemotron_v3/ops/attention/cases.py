"""Shapes that the tests and benchmarks of attention share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`mask`: None is causal within documents; "bool" and "additive" are masks of no pattern, one
    a batch row, with rows that may attend to nothing. `padding` is left padding, a number a row."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    mask: Literal["bool", "additive"] | None = None
    padding: tuple[int, ...] = ()
    scale: float | None = None
    strided: bool = False


CASES = (
    Case("one-token", (1,), 3, 1, 64),
    Case("two", (2,), 4, 4, 80),
    Case("three", (3,), 8, 2, 128),
    Case("below-chunk", (127,), 4, 2, 64),
    Case("above-chunk", (129,), 3, 3, 80, strided=True),
    Case("scaled", (64,), 6, 2, 16, scale=1.0),
    Case("thousand", (1000,), 2, 1, 16),
    Case("pack", (1, 0, 5, 1, 40, 3), 6, 2, 64, strided=True),
    Case("batch", (33, 33, 33), 4, 1, 32),
    Case("mask-bool", (12, 12), 4, 2, 32, mask="bool"),
    Case("mask-additive", (12, 12), 4, 2, 32, mask="additive"),
    Case("mask-padded", (12, 5, 0), 4, 2, 32, mask="bool", padding=(0, 7, 12)),
    Case("all-empty", (0, 0), 4, 2, 32),
)
FIXED_SIZE = CASES[4]  # one document, of no size that attention at fixed sizes knows


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    draw = Draw(generator, dtype, device, case.strided)
    tokens = sum(case.lengths)
    tensors = {
        "q": draw.activation(tokens, case.heads, case.head_dim),
        "k": draw.activation(tokens, case.kv_heads, case.head_dim),
        "v": draw.activation(tokens, case.kv_heads, case.head_dim),
    }
    options = {"layout": make_layout(case, device), "mask": None, "scale": case.scale}
    if case.mask is not None:
        rows, length = options["layout"].shape
        allowed = draw.integers(rows, 1, length, length, high=3) > 0
        allowed[:, :, 2] = False
        options["mask"] = allowed
        if case.mask == "additive":
            bias = draw.normal(rows, 1, length, length)
            options["mask"] = bias.masked_fill(~allowed, -torch.inf)
    return Inputs(tensors, options)


def make_layout(case: Case, device: torch.device | str) -> SequenceLayout:
    """Rows of a batch where there is a mask, a pack without a batch dimension otherwise."""
    if case.mask is None:
        return SequenceLayout.from_lengths(case.lengths, device)
    if not case.padding:
        return SequenceLayout.plain(len(case.lengths), case.lengths[0], device)
    columns = torch.arange(max(case.lengths), device=device)
    starts = torch.tensor(case.padding, device=device)
    return SequenceLayout.from_padding_mask((columns >= starts[:, None]).long())


def of_last_tokens(cached_attention: Callable) -> Callable:
    """`attention`'s arguments for `cached_attention`: all but three tokens are in the cache."""

    def run(
        *, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Any, mask: None, scale: None
    ) -> torch.Tensor:
        rows, held, new = layout.num_documents, layout.uniform_length - 3, 3
        return cached_attention(
            q.unflatten(0, (rows, -1))[:, held:].flatten(0, 1),
            *(t.unflatten(0, (rows, -1)).transpose(1, 2) for t in (k, v)),
            layout=SequenceLayout.plain(rows, new, q.device),
            starts=(held,) * rows,
            positions=torch.full((rows,), held, device=q.device),
        )

    return run
