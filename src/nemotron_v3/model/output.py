"""What the models return."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class ModelOutput:
    """Of `NemotronV3Model`.

    Attributes:
        last_hidden_state: `[B, S, D]` (`[T, D]` without a batch dimension), after the final norm.
        hidden_states: if asked for, the embeddings, then the stream after each block, the last of
            them after the final norm: num_hidden_layers + 1 tensors.
        past_key_values: the cache, or None.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: Any = None


@dataclass
class CausalLMOutput:
    """Of `NemotronV3ForCausalLM`.

    Attributes:
        loss: a scalar in fp32 or wider, nats per target, or None without labels.
        logits: `[B, S, V]` (`[T, V]` without a batch dimension) in the model's dtype; 0 at padding.
        hidden_states: see `ModelOutput`.
        past_key_values: the cache, or None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: Any = None
