"""Log-probabilities that a model gives to tokens it is shown."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode
from nemotron_v3.model.checks import token_grid
from nemotron_v3.model.head import plain_weight
from nemotron_v3.model.protocol import CausalLM

LOGITS_AT_ONCE = 2**24  # 64 MiB in fp32


@outside_inference_mode
def score(
    model: CausalLM,
    input_ids: Tensor,
    layout: SequenceLayout | None = None,
    attention_mask: Tensor | None = None,
    **layout_kwargs: Any,
) -> Tensor:
    """Teacher-forced log-probabilities of the tokens.

    Differentiable. The logits are computed in chunks of tokens, and in the backward pass once
    more, so that neither they nor their softmax are ever held for all tokens at once.

    Args:
        model: the model.
        input_ids: int64 `[B, S]`, or `[T]` without a batch dimension.
        layout: where documents lie; or `cu_seqlens`, `seq_idx`, ... in `layout_kwargs`.
        attention_mask: `[B, S]`, 1 = real and 0 = padding on any side, or None.
        **layout_kwargs: what `SequenceLayout.resolve` takes.

    Returns:
        The shape of `input_ids`, fp32 or wider, in nats: at each token its log-probability after
        the tokens before it in its document. 0 at a document's first token, which nothing
        predicts, and at padding.

    Raises:
        ValueError, TypeError: masks or layouts that do not fit.
    """
    shape, device = token_grid(input_ids, None, model.config.hidden_size)
    layout = SequenceLayout.resolve(shape, device, attention_mask, layout=layout, **layout_kwargs)
    hidden = layout.pack(model.model(input_ids, layout=layout).last_hidden_state)  # [T, D]
    next_tokens = ops.shift_labels(input_ids, layout)  # [T], negative at a document's end
    scores = log_probabilities(model, hidden, next_tokens)
    return layout.unpack(torch.cat([scores.new_zeros(min(1, len(scores))), scores[:-1]]))


def log_probabilities(model: CausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities of tokens by the hidden states before them, a chunk of tokens at a time.

    Args:
        model: whose head is asked.
        hidden: `[T, D]`, what `model.model` gives.
        targets: int64 `[T]`, the token that follows each; -100 where none is asked for.

    Returns:
        `[T]` in fp32 or wider, in nats; 0 where none is asked for. Differentiable.
    """
    weight = plain_weight(model.lm_head)
    if weight is None:
        return _by_the_head(model, hidden, targets)
    impl = model.model.backend.impl
    return ops.linear_log_probabilities(hidden, weight, targets, impl=impl)[0]


def _by_the_head(model: CausalLM, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    """`[T, D]` and `[T]` -> the log-probabilities of the next tokens by a head that is called."""
    tokens = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = zip(hidden.split(tokens), next_tokens.split(tokens), strict=True)
    return torch.cat([_of_next(model, *part) for part in parts])


def _of_next(model: CausalLM, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    """`[T, D]` and `[T]` -> the log-probability of each next token, 0 where there is none."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        return checkpoint(_log_probability, model, hidden, next_tokens, use_reentrant=False)
    return _log_probability(model, hidden, next_tokens)


def _log_probability(model: CausalLM, hidden: Tensor, next_tokens: Tensor) -> Tensor:
    logits = model.lm_head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(1, next_tokens.clamp(min=0)[:, None])[:, 0]
    return (chosen - logits.logsumexp(-1)).masked_fill(next_tokens < 0, 0)
