"""What every layer does first: check its input, and find out how the tokens lie."""

import inspect
from typing import Any

from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.layers.offsets import of_this_call
from nemotron_v3.layout import SequenceLayout


def enter(
    hidden_states: Tensor,
    width: int,
    attention_mask: Tensor | None,
    layout_kwargs: dict[str, Any],
    cache: NemotronHybridCache | None = None,
    *,
    layer_idx: int | None = None,
    by_token: bool = False,
) -> SequenceLayout:
    """Check the hidden states and resolve the layout of their tokens.

    Args:
        hidden_states: `[B, S, width]`, or `[T, width]` without a batch dimension.
        attention_mask: a 2-D padding mask or None.
        layout_kwargs: the keyword arguments of `SequenceLayout.resolve`.
        cache: what the tokens follow, or None.
        layer_idx: the layer's number in the cache, if it has a state there.
        by_token: whether the layer works token by token (see `of_this_call`).

    Raises:
        ValueError: another rank or width, or a layout that does not fit.
        TypeError: a keyword argument no layer understands, or what is no tensor of floats.
    """
    check_names(layout_kwargs)
    check_floats(hidden_states)
    if hidden_states.dim() not in (2, 3) or hidden_states.shape[-1] != width:
        raise ValueError(
            f"hidden size {hidden_states.shape[-1:].numel()} of hidden states "
            f"{tuple(hidden_states.shape)} does not fit: this layer takes (batch, seq_len, "
            f"{width}) or (tokens, {width})"
        )
    shape = tuple(hidden_states.shape[:-1])
    if attention_mask is None and layout_kwargs.keys() == {"layout"}:
        layout = layout_kwargs["layout"]
        if isinstance(layout, SequenceLayout) and (layout.shape, layout.device) == (
            shape,
            hidden_states.device,
        ):
            return layout  # as a model hands it to its blocks, many times a token
    attention_mask = of_new_tokens(attention_mask, shape, cache)
    layout_kwargs = of_this_call(layout_kwargs, shape, attention_mask, cache, layer_idx, by_token)
    return SequenceLayout.resolve(shape, hidden_states.device, attention_mask, **layout_kwargs)


def check_size(name: str, size: Any) -> None:
    """Raises ValueError or TypeError unless a width is a whole number of at least 1."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"{name} is {size!r}: give an int")
    if size < 1:
        raise ValueError(f"{name} is {size}: give at least 1")


def check_floats(hidden_states: Any) -> None:
    """Raises TypeError for anything but a tensor of real floating-point numbers."""
    if not isinstance(hidden_states, Tensor):
        raise TypeError(
            f"hidden states are a {type(hidden_states).__name__}: give a tensor (batch, seq_len, "
            "hidden_size) or (tokens, hidden_size)"
        )
    if not hidden_states.is_floating_point():
        raise TypeError(
            f"hidden states are {hidden_states.dtype}: give floating-point numbers in the dtype of "
            "the layer; token ids belong to a model's input_ids"
        )


def of_new_tokens(
    mask: Tensor | None, shape: tuple[int, ...], cache: NemotronHybridCache | None
) -> Tensor | None:
    """The columns of a padding mask that belong to the new tokens.

    With a cache a caller may go on giving the mask of the whole sequence: what the cache holds is
    settled, only the last columns say anything.

    Raises:
        ValueError: more columns than new tokens, but fewer than a row of the cache holds.
    """
    if mask is None or cache is None or not cache.has_previous_state or not _up_to_2d(mask):
        return mask
    if mask.shape[-1] <= shape[-1]:
        return mask
    if mask.shape[-1] < (longest := cache.get_seq_length()):
        raise ValueError(
            f"attention_mask has {mask.shape[-1]} columns for {shape[-1]} new tokens behind a "
            f"cache of {longest}: give those of the new tokens, or of all"
        )
    return mask[..., -shape[-1] :]


def is_4d(mask: Any) -> bool:
    """Whether a mask speaks of pairs of tokens."""
    return isinstance(mask, Tensor) and mask.dim() == 4


def _up_to_2d(mask: Any) -> bool:
    return isinstance(mask, Tensor) and 1 <= mask.dim() <= 2


def check_names(layout_kwargs: dict[str, Any], who: str = "a layer") -> None:
    """Raises TypeError for a keyword argument no layer understands."""
    for name in layout_kwargs:
        if name not in _LAYOUT_NAMES:
            raise TypeError(
                f"unexpected keyword argument {name!r}: {who} takes {', '.join(_LAYOUT_NAMES)}"
            )


_LAYOUT_NAMES = tuple(
    name
    for name, parameter in inspect.signature(SequenceLayout.resolve).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
)


def as_cache(past_key_values: Any) -> NemotronHybridCache | None:
    """Raises TypeError for a cache of another kind, which would hold states of other shapes."""
    if past_key_values is None or isinstance(past_key_values, NemotronHybridCache):
        return past_key_values
    raise TypeError(
        f"past_key_values is a {full_name(past_key_values)}: give a "
        "nemotron_v3.NemotronHybridCache made from the model's config"
    )


def full_name(value: Any) -> str:
    """The class of a value with its module, for another package's class of the same name."""
    kind = type(value)
    own = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{own}{kind.__qualname__}"
