"""What every layer does first: check its input, and find out how the tokens lie."""

import inspect
from typing import Any

from torch import Tensor

from nemotron_v3.layout import SequenceLayout


def enter(
    hidden_states: Tensor, width: int, attention_mask: Tensor | None, layout_kwargs: dict[str, Any]
) -> SequenceLayout:
    """Check the hidden states and resolve the layout of their tokens.

    Args:
        hidden_states: `[B, S, width]`, or `[T, width]` without a batch dimension.
        attention_mask: a 2-D padding mask or None.
        layout_kwargs: the keyword arguments of `SequenceLayout.resolve`.

    Raises:
        ValueError: another rank or width, or a layout that does not fit.
        TypeError: a keyword argument no layer understands.
    """
    check_names(layout_kwargs)
    if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != width:
        raise ValueError(
            f"hidden size {hidden_states.shape[-1]} of hidden states {tuple(hidden_states.shape)} "
            f"does not fit: this layer takes (batch, seq_len, {width}) or (tokens, {width})"
        )
    return SequenceLayout.resolve(
        tuple(hidden_states.shape[:-1]), hidden_states.device, attention_mask, **layout_kwargs
    )


def check_names(layout_kwargs: dict[str, Any]) -> None:
    """Raises TypeError for a keyword argument no layer understands."""
    for name in layout_kwargs:
        if name not in _LAYOUT_NAMES:
            raise TypeError(
                f"unexpected keyword argument {name!r}: a layer takes {', '.join(_LAYOUT_NAMES)}"
            )


_LAYOUT_NAMES = tuple(
    name
    for name, parameter in inspect.signature(SequenceLayout.resolve).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def refuse_cache(past_key_values: Any) -> None:
    """Raises NotImplementedError where a cache is given: state is not carried between calls yet."""
    if past_key_values is not None:
        raise NotImplementedError(
            f"past_key_values ({type(past_key_values).__name__}) is not supported yet: give the "
            "whole sequence and no cache"
        )
