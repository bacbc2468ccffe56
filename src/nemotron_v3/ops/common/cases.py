"""What the `cases.py` of every op are made of: named shapes, and inputs drawn for them.

A case is a frozen dataclass of shapes. `make_inputs(case, dtype, device, generator)` of the op's
`cases.py` turns it into `Inputs`. Values are drawn in fp64 on the CPU and then rounded, so a seed
means the same numbers in every dtype and on every device.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Inputs:
    """Arguments of an op: those it is differentiated by, and the rest.

    Attributes:
        tensors: differentiable tensors by argument name; None where the op is called without one.
        options: every other argument by name (layouts, indices, numbers).
    """

    tensors: Mapping[str, Tensor | None]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Draw:
    """Random tensors of one dtype on one device.

    Attributes:
        generator: of the CPU.
        dtype: of activations and weights.
        device: where the tensors are put.
        strided: whether activations lie with a stride, as slices of a wider projection do.
    """

    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device | str = "cpu"
    strided: bool = False

    @property
    def wide(self) -> torch.dtype:
        """fp32 or wider: the dtype of A, D, dt_bias, SSM states and routing weights."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, scale: float = 1.0, wide: bool = False) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return self._place(values * scale, wide)

    def uniform(self, *shape: int, low: float, high: float, wide: bool = False) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return self._place(low + (high - low) * values, wide)

    def integers(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def activation(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal values, with a gap between rows where `strided`."""
        if not self.strided:
            return self.normal(*shape, scale=scale)
        gap = 3
        wider = self.normal(*shape[:-1], shape[-1] + gap, scale=scale)
        return wider[..., : shape[-1]]

    def _place(self, values: Tensor, wide: bool) -> Tensor:
        return values.to(device=self.device, dtype=self.wide if wide else self.dtype)
