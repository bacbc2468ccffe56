"""PEFT's LoRA beside a linear layer, computed as one op where it is nothing but that."""

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn

from nemotron_v3 import ops
from nemotron_v3.layers.hooks import must_call


class FusedLoraLinear(Linear):
    """A LoRA layer of PEFT whose call is `ops.low_rank_linear` wherever both compute the same.

    PEFT makes the update as a tensor of the output's size, scales it and adds it: three passes over
    memory, and as many again of what autograd keeps. In every other case (several adapters or none,
    merged ones, dropout, variants such as DoRA, another layer or dtype inside, hooks, autocast) it
    is PEFT's own call.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., inputs]` -> `[..., outputs]`."""
        name = None if args or kwargs else self._plain_adapter(x)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, a, b = (
            cast(nn.Linear, layer)
            for layer in (self.base_layer, self.lora_A[name], self.lora_B[name])
        )
        return ops.low_rank_linear(
            x,
            base.weight,
            a.weight,
            b.weight,
            base.bias,
            scale=self.scaling[name],
        )

    def _plain_adapter(self, x: Tensor) -> str | None:
        """The one adapter to compute with; None where PEFT has to say what is computed."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1:
            return None
        name = active[0]
        if name not in self.lora_A or name in self.lora_variant:
            return None
        if torch.is_autocast_enabled(x.device.type):
            return None
        dropout = self.lora_dropout[name]
        if self.training and not isinstance(dropout, nn.Identity):
            return None
        layers = (self.base_layer, self.lora_A[name], self.lora_B[name])
        if any(must_call(layer, nn.Linear) for layer in layers) or layers[2].bias is not None:
            return None
        weights = [layer.weight for layer in layers]
        plain = (Tensor, nn.Parameter)  # exactly these: a quantised weight has another class
        return name if all(type(w) in plain and w.dtype == x.dtype for w in weights) else None


def fuse_lora_(model: nn.Module) -> None:
    """Let every LoRA layer of PEFT's own class in a model compute as one op."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLoraLinear
