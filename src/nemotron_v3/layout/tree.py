"""A layout as a pytree, for what flattens the arguments of a module and builds them again.

Its leaves are its two tensors. Built again from the same tensors it is the same layout, with the
index tables that ops have worked out; of tensors that were cut it is none.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nemotron_v3.layout.sequence import SequenceLayout


class _Context(tuple):
    """`(shape, lengths)`, equal to such a tuple, that knows the layout it was taken from."""

    origin: "weakref.ref[SequenceLayout] | None" = None

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (tuple(self),)


def _flatten(layout: SequenceLayout) -> tuple[list[Any], tuple[Any, ...]]:
    context = (layout.shape, layout.lengths)
    if not torch.compiler.is_compiling():
        context = _Context(context)
        context.origin = weakref.ref(layout)
    return [layout.cu_seqlens, layout.token_index], context


def _unflatten(children: Any, context: tuple[Any, ...]) -> SequenceLayout:
    cu_seqlens, token_index = children
    shape, lengths = context
    if isinstance(context, _Context) and context.origin is not None:
        layout = context.origin()
        if (
            layout is not None
            and layout.cu_seqlens is cu_seqlens
            and layout.token_index is token_index
        ):
            return layout
    # What stands in the place of a tensor without being one (a spec, None) is not looked at.
    _refuse_cut(cu_seqlens, len(lengths) + 1, shape, lengths)
    _refuse_cut(token_index, sum(lengths), shape, lengths)
    return SequenceLayout(tuple(shape), tuple(lengths), cu_seqlens, token_index)


def _refuse_cut(
    tensor: Any, expected: int, shape: tuple[int, ...], lengths: tuple[int, ...]
) -> None:
    if isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.shape[0] != expected:
        raise ValueError(
            f"the SequenceLayout of tokens {tuple(shape)} in {len(lengths)} documents was cut as "
            f"if it were a tensor ({tensor.shape[0]} of {expected} entries are left), as a "
            "pipeline cuts its arguments into micro-batches: leave layout out and give "
            "attention_mask, seq_idx or position_ids of shape (batch, seq_len), which are cut with "
            "the tokens, or make one layout a micro-batch"
        )


pytree.register_pytree_node(
    SequenceLayout,
    _flatten,
    _unflatten,
    serialized_type_name="nemotron_v3.SequenceLayout",
)
