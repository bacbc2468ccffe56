"""What a layer checks of the hidden states that it is called with, and of its sizes."""

from typing import Any, NoReturn

from torch import Tensor

from nemotron_v3.config import BLOCK_TYPES


def grid_of(hidden_states: Any, width: int) -> tuple[int, ...]:
    """The grid `(B, S)` or `(T,)` of hidden states `[B, S, width]` or `[T, width]`.

    Raises:
        ValueError: another rank or width.
        TypeError: no tensor of floats.
    """
    if not isinstance(hidden_states, Tensor) or not hidden_states.is_floating_point():
        refuse_other_than_floats(hidden_states)
    if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != width:
        raise ValueError(
            f"hidden size {hidden_states.shape[-1:].numel()} of hidden states "
            f"{tuple(hidden_states.shape)} does not fit: this layer takes (batch, seq_len, "
            f"{width}) or (tokens, {width})"
        )
    return tuple(hidden_states.shape[:-1])


def refuse_other_than_floats(hidden_states: Any) -> NoReturn:
    """Raises TypeError, for anything but a tensor of real floating-point numbers."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(
            f"hidden states are a {type(hidden_states).__name__}: give a tensor (batch, seq_len, "
            "hidden_size) or (tokens, hidden_size)"
        )
    raise TypeError(
        f"hidden states are {hidden_states.dtype}: give floating-point numbers in the dtype of the "
        "layer; token ids belong to a model's input_ids"
    )


def check_size(name: str, size: Any) -> None:
    """Raises ValueError or TypeError unless a width is a whole number of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} is {size!r}: give an int")
    if size < 1:
        raise ValueError(f"{name} is {size}: give at least 1")


def unknown_block_type(block_type: str) -> ValueError:
    """What to raise where a block type has no branch of its own, so that it is taken for no other.

    Of another project's block, which runs as it was once the layers are not put in its place.
    """
    return ValueError(
        f"a block of type {block_type!r} is not known here, where {', '.join(BLOCK_TYPES)} are: "
        "run the model without nemotron_v3's layers"
    )
