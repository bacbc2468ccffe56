"""Parameters that stay fp32 or wider, whatever the rest of the module is cast to.

`A_log` passes through two exponentials and `e_score_correction_bias` decides a top-k: their
rounding to 16 bits is an error that nothing downstream can undo.
"""

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn


class KeepsFp32(nn.Module):
    """A module whose tensors named in `fp32_tensors` are never cast below fp32.

    `.to(torch.bfloat16)`, `.half()` and the like still move them and still cast the others; a
    gradient is treated as its parameter is.

    Attributes:
        local: a function that gives what a call computes with in place of such a tensor (where
            several processes hold it); None where that is the tensor itself.
    """

    fp32_tensors: tuple[str, ...] = ()
    local: Callable[[Tensor], Tensor] | None = None

    def _kept(self) -> Iterable[Tensor]:
        own = {**self._parameters, **self._buffers}
        for name in self.fp32_tensors:
            # A parametrized tensor is made of others: those are kept in its place.
            of_name = [own[name]] if name in own else self._parametrization(name).parameters()
            for tensor in of_name:
                yield tensor
                if tensor.grad is not None:
                    yield tensor.grad

    def _parametrization(self, name: str) -> nn.Module:
        return self.get_submodule(f"parametrizations.{name}")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {id(tensor) for tensor in self._kept()}

        def keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) not in kept or not _narrower(applied.dtype, torch.float32):
                return applied
            return tensor.to(device=applied.device, dtype=torch.float32)

        # No child but a parametrization holds such a tensor: the others see `fn` itself.
        super()._apply(keep, recurse=False)
        if recurse:
            for name, child in self.named_children():
                child._apply(keep if name == "parametrizations" else fn)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """`assign=True` would take a narrower tensor as it is."""
        for name in self.fp32_tensors:
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and _narrower(given.dtype, torch.float32):
                state_dict[prefix + name] = given.to(torch.float32)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < than.itemsize


def at_least_fp32(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype such a tensor has in a module of `dtype` (None: torch's default)."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
