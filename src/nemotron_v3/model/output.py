"""What the models return: dataclasses and pytrees, in which wrappers such as DDP find tensors."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


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


@dataclass(repr=False, eq=False)
class CausalLMOutput:
    """Of `NemotronV3ForCausalLM`.

    Attributes:
        loss: a scalar in fp32 or wider, nats per target, or None without labels.
        logits: `[B, S, V]` (`[T, V]` without a batch dimension) in the model's dtype; 0 at padding.
            Beside a loss they are computed when they are first read: who does not read them never
            holds them.
        hidden_states: see `ModelOutput`.
        past_key_values: the cache, or None.
    """

    loss: Tensor | None = None
    _logits: "Tensor | LazyLogits | None" = None
    hidden_states: tuple[Tensor, ...] | None = None
    past_key_values: Any = None

    @property
    def logits(self) -> Tensor | None:
        """See the class.

        Raises:
            RuntimeError: they were not read before the head's weight changed.
        """
        if isinstance(self._logits, LazyLogits):
            self._logits = self._logits.compute()
        return self._logits

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds the logits themselves, not the head that makes them."""
        return self.__dict__ | {"_logits": self.logits}

    def __repr__(self) -> str:
        logits = "unread" if isinstance(self._logits, LazyLogits) else self._logits
        return (
            f"CausalLMOutput(loss={self.loss}, logits={logits}, "
            f"hidden_states={self.hidden_states}, past_key_values={self.past_key_values})"
        )


class LazyLogits:
    """Logits that nobody has asked for yet.

    Args:
        head: from hidden states to logits.
        hidden: `[B, S, D]` or `[T, D]`, after the final norm.
    """

    def __init__(self, head: nn.Module, hidden: Tensor):
        self.head: nn.Module = head
        self.hidden: Tensor = hidden
        self.grad: bool = torch.is_grad_enabled()
        self.weight: Tensor = cast(Tensor, head.weight)
        self.state: tuple[torch.dtype, torch.device, int] = _state(self.weight)
        kind = hidden.device.type
        self.autocast: torch.dtype | None = None
        if kind != "meta" and torch.is_autocast_enabled(kind):
            self.autocast = torch.get_autocast_dtype(kind)

    def of(self, hidden: Tensor) -> Self:
        """The same of other hidden states."""
        other = copy.copy(self)
        other.hidden = hidden
        return other

    def compute(self) -> Tensor:
        """The head's product as the forward pass would have made it: its graph, its autocast."""
        weight = cast(Tensor, self.head.weight)
        if weight is not self.weight or _state(weight) != self.state:
            raise RuntimeError(
                "the logits were not read before the head's weight changed (an optimiser's step, a "
                "load, a cast, the backward pass of a sharded model): read output.logits "
                "first, or call the model without labels"
            )
        kind, narrow = self.hidden.device.type, self.autocast
        context = nullcontext()
        if kind != "meta":
            context = torch.autocast(kind, narrow, enabled=narrow is not None)
        with torch.set_grad_enabled(self.grad), context:
            return self.head(self.hidden)


def _state(tensor: Tensor) -> tuple[torch.dtype, torch.device, int]:
    """Changes with the tensor: its dtype, its place, how often it was written in place (which
    tensors of inference mode do not count)."""
    # A compiler cannot ask for the mode, and trains outside of it.
    counted = torch.compiler.is_compiling() or not tensor.is_inference()
    return tensor.dtype, tensor.device, tensor._version if counted else 0


# A leaf is a tensor: what is None, and the cache, which is updated in place, go in the context.


def _flatten_causal(output: CausalLMOutput) -> tuple[list[Any], dict[str, Any]]:
    """Logits that are unread stay so: their hidden states are the tensor that leads to them."""
    logits = output._logits
    unread = logits if isinstance(logits, LazyLogits) else None
    parts = {
        "loss": output.loss,
        "_logits": logits if unread is None else unread.hidden,
        "hidden_states": output.hidden_states,
    }
    given = {name: part for name, part in parts.items() if part is not None}
    rest = {"names": tuple(given), "unread": unread, "past_key_values": output.past_key_values}
    return list(given.values()), rest


def _unflatten_causal(parts: Any, rest: dict[str, Any]) -> CausalLMOutput:
    given = dict(zip(rest["names"], parts, strict=True))
    if rest["unread"] is not None:
        given["_logits"] = rest["unread"].of(given["_logits"])
    return CausalLMOutput(**given, past_key_values=rest["past_key_values"])


def _flatten_model(output: ModelOutput) -> tuple[list[Any], Any]:
    parts: list[Any] = [output.last_hidden_state]
    if output.hidden_states is not None:
        parts.append(output.hidden_states)
    return parts, output.past_key_values


def _unflatten_model(parts: Any, cache: Any) -> ModelOutput:
    return ModelOutput(*parts, past_key_values=cache)


pytree.register_pytree_node(CausalLMOutput, _flatten_causal, _unflatten_causal)
pytree.register_pytree_node(ModelOutput, _flatten_model, _unflatten_model)
