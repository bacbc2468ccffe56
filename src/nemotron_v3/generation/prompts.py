"""Prompts in every form callers have them, as one list of real tokens a row, and what of them a
cache does not hold yet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.text import check_text
from nemotron_v3.layers.context import full_name
from nemotron_v3.layout import SequenceLayout


def read_prompts(
    input_ids: Any, attention_mask: Tensor | None, tokenizer: Any, vocab_size: int
) -> list[Tensor]:
    """The real tokens of each row: int64 `[n]` on the CPU, padding removed.

    Args:
        input_ids: integers `[rows, S]` or `[S]`; a list of ints, or of rows of different lengths;
            a text, or a list of texts.
        attention_mask: like a tensor `input_ids`, 1 = real and 0 = padding, on any side.
        tokenizer: encodes texts.
        vocab_size: tokens must be below it.

    Raises:
        ValueError: no row, a row without a real token, a token outside the vocabulary, a mask that
            does not fit, a text without a tokenizer.
        TypeError: anything else.
    """
    if isinstance(input_ids, Tensor):
        rows = _of_tensor(input_ids, attention_mask)
    elif attention_mask is not None:
        raise ValueError(
            "attention_mask goes with a tensor of input_ids: rows of a list hold real tokens alone"
        )
    else:
        rows = [_of_row(n, row, tokenizer) for n, row in enumerate(_as_rows(input_ids))]
    if not rows:
        raise ValueError("input_ids holds no row: give at least one prompt")
    for number, row in enumerate(rows):
        if not row.numel():
            raise ValueError(
                f"row {number} is empty or all padding: a prompt needs at least one token, such as "
                "the bos token"
            )
        least, most = int(row.min()), int(row.max())
        if least < 0 or most >= vocab_size:
            raise ValueError(
                f"row {number} holds token {least if least < 0 else most}, outside the "
                f"vocabulary of {vocab_size}"
            )
    return rows


def unfed_of(
    cache: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    config: NemotronV3Config,
    embeddings: Tensor,
) -> list[Tensor]:
    """What of each prompt a cache does not hold yet.

    Args:
        prompts: as `read_prompts` returns them.
        new_tokens: that may follow each of them.
        config, embeddings: the model's.

    Raises:
        ValueError: a cache of another config, batch or dtype, one that holds all of a prompt, or
            one that is too short for what is to come.
        TypeError: what is no cache.
    """
    if not isinstance(cache, NemotronHybridCache):
        raise TypeError(
            f"past_key_values is a {full_name(cache)}: give a NemotronHybridCache made "
            "from the model's config"
        )
    if cache.batch_size != len(prompts):
        raise ValueError(
            f"the cache has {cache.batch_size} rows, input_ids {len(prompts)}: they must "
            "be the same"
        )
    unfed = []
    for row, (prompt, held) in enumerate(zip(prompts, cache.lengths, strict=True)):
        if held >= len(prompt):
            raise ValueError(
                f"row {row} of the cache holds {held} tokens, its prompt has {len(prompt)}: "
                "give the whole sequence, what the cache holds and at least one token more, or "
                "take one back (rollback)"
            )
        unfed.append(prompt[held:])
    # The last new token is never fed.
    fed = [len(tokens) + new_tokens - 1 for tokens in unfed]
    layout = SequenceLayout.from_lengths(fed, embeddings.device)
    cache.check(config, embeddings.dtype, layout)
    return unfed


def _of_tensor(input_ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {input_ids.dtype}")
    if input_ids.device.type == "meta":
        raise ValueError("input_ids are on the meta device, and their values are needed: give them")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask is a {type(mask).__name__}: give a tensor")
    if input_ids.dim() == 1:
        input_ids = input_ids[None]
        mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}: (rows, tokens) or (tokens,) is needed"
        )
    if mask is not None and mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}: "
            "they must match"
        )
    ids = input_ids.detach().cpu().to(torch.int64)
    if mask is None or not input_ids.numel():
        return list(ids)
    layout = SequenceLayout.from_padding_mask(mask.cpu())
    return list(layout.pack(ids).split(layout.lengths))


def _as_rows(prompts: Any) -> list[Any]:
    """One prompt stands for a list of one."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise TypeError(
            f"input_ids is a {type(prompts).__name__}: give a tensor, lists of token ids, or texts"
        )
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)


def _of_row(number: int, row: Any, tokenizer: Any) -> Tensor:
    if isinstance(row, str):
        if tokenizer is None:
            raise ValueError("prompts given as text need a tokenizer: give one, or token ids")
        check_text(row, f"row {number}")
        row = tokenizer.encode(row)
    try:
        ids = torch.as_tensor(row).detach().cpu()
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"row {number} holds what is no token id: {error}") from None
    if ids.dim() != 1:
        raise ValueError(f"a row of the list has shape {tuple(ids.shape)}: (tokens,) is needed")
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise TypeError(f"token ids must be integers, got {ids.dtype}")
    return ids.to(torch.int64)
