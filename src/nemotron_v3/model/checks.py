"""What a model checks of its arguments before anything runs."""

from typing import Any

import torch
from torch import Tensor, nn

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layers.context import ForwardContext

ID_DTYPES = (torch.int64, torch.int32)  # that an embedding looks up


def enter(
    config: NemotronV3Config,
    embeddings: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    attention_mask: Tensor | None,
    past_key_values: Any,
    layout_kwargs: dict[str, Any],
) -> ForwardContext:
    """The context of a model's pass; everything that can be refused of it is refused here.

    Args:
        embeddings: the model's matrix, in whose dtype a cache has to be.
        shape, device: what `token_grid` says.
        attention_mask, past_key_values, layout_kwargs: see `ForwardContext.enter`.

    Raises:
        ValueError, TypeError: what `ForwardContext.enter` and `NemotronHybridCache.check` raise.
    """
    context = ForwardContext.enter(
        shape, device, attention_mask, past_key_values, layout_kwargs, who="the model"
    )
    if device.type == "meta" and not embeddings.is_meta:
        raise ValueError(
            f"the tokens are on the meta device, the model on {embeddings.device}: move one of them"
        )
    if context.cache is not None:
        context.cache.check(config, embeddings.dtype, context.layout)
    return context


def token_grid(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int
) -> tuple[tuple[int, ...], torch.device]:
    """The shape `(B, S)` or `(T,)` of the tokens given, and where they are.

    Raises:
        ValueError: not exactly one of both, another rank or width.
        TypeError: no tensor, ids that are no integers, embeddings that are no floats.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            "give exactly one of input_ids and inputs_embeds, got "
            + ("neither" if input_ids is None else "both")
        )
    name, tokens = "input_ids", input_ids
    if inputs_embeds is not None:
        name, tokens = "inputs_embeds", inputs_embeds
    if not isinstance(tokens, Tensor):
        raise TypeError(f"{name} is a {type(tokens).__name__}: give a tensor")
    if inputs_embeds is None and tokens.dtype not in ID_DTYPES:
        raise TypeError(
            f"input_ids are {tokens.dtype}: give token ids as integers, int64 or int32, or "
            "embeddings as inputs_embeds"
        )
    if inputs_embeds is not None and not tokens.is_floating_point():
        raise TypeError(f"inputs_embeds are {tokens.dtype}: give floats, or ids as input_ids")
    if inputs_embeds is not None and inputs_embeds.shape[-1:] != (width,):
        raise ValueError(
            f"inputs_embeds have shape {tuple(inputs_embeds.shape)}, the model's hidden size is "
            f"{width}: give (batch, seq_len, {width}) or (tokens, {width})"
        )
    shape = tokens.shape if inputs_embeds is None else tokens.shape[:-1]
    if len(shape) not in (1, 2):
        raise ValueError(
            f"tokens have shape {tuple(shape)}: (batch, seq_len) or (tokens,) is needed"
        )
    return tuple(shape), tokens.device


def refuse_ids(embeddings: nn.Embedding, input_ids: Tensor) -> None:
    """Raises IndexError where a look-up failed at an id outside the vocabulary, by its number.

    So it does on a CPU; a GPU says so in its way.
    """
    rows = embeddings.weight.shape[0]
    wrong = input_ids[(input_ids < 0) | (input_ids >= rows)]
    if wrong.numel():
        raise IndexError(
            f"token id {int(wrong[0])} is outside the vocabulary of {rows}: give ids of the "
            "model's own tokenizer"
        ) from None


def check_labels(
    labels: Any,
    shape: tuple[int, ...],
    device: torch.device | None = None,
    name: str = "labels",
) -> None:
    """Raises ValueError or TypeError unless labels are integers, one a token.

    Args:
        device: where they have to be; None does not matter.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} are a {type(labels).__name__}: give a tensor of token ids")
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"{name} have shape {tuple(labels.shape)}, the tokens {shape}: give one a "
            "token; labels are shifted inside, shift_labels were before"
        )
    if labels.dtype not in ID_DTYPES:
        raise TypeError(f"{name} are {labels.dtype}: give token ids as integers, int64 or int32")
    if device is not None and labels.device != device:
        raise ValueError(f"{name} are on {labels.device}, the tokens on {device}: move one of them")


def check_kept(logits_to_keep: Any, seq_len: int) -> None:
    """Raises ValueError or TypeError unless `logits_to_keep` is a number or a list of places.

    Args:
        seq_len: places that the call has.
    """
    if isinstance(logits_to_keep, Tensor):
        if logits_to_keep.dtype not in ID_DTYPES or logits_to_keep.dim() > 1:
            raise TypeError(
                f"logits_to_keep is {logits_to_keep.dtype} of shape {tuple(logits_to_keep.shape)}: "
                "give positions as integers (n,), or how many of the last"
            )
        check_places(logits_to_keep, 0, seq_len)
    elif not isinstance(logits_to_keep, int) or isinstance(logits_to_keep, bool):
        raise TypeError(
            f"logits_to_keep is {logits_to_keep!r}: give how many of the last positions (0 for "
            "all), or a tensor of positions"
        )
    elif logits_to_keep < 0:
        raise ValueError(f"logits_to_keep must not be negative, got {logits_to_keep}")


def check_places(places: Tensor, least: int, end: int) -> None:
    """Raises ValueError for a position in `logits_to_keep` that is not in `least ... end - 1`.

    They are read on a CPU alone: a GPU would have to be waited for.
    """
    readable = type(places) is Tensor and not torch.compiler.is_compiling()
    if not (readable and places.is_cpu and places.numel()):
        return
    wrong = places[(places < least) | (places >= end)]
    if wrong.numel():
        raise ValueError(
            f"logits_to_keep holds the position {int(wrong.flatten()[0])}, and the call has {end} "
            f"places: give positions from {least} to {end - 1}"
        )
