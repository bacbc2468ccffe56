"""Parameters that stay fp32 or wider, whatever the rest of the module is cast to.

`A_log` passes through two exponentials and `e_score_correction_bias` decides a top-k: their
rounding to 16 bits is an error that nothing downstream can undo.
"""

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn


class KeepsFp32(nn.Module):
    """A module whose tensors named in `fp32_tensors` are never cast below fp32.

    `.to(torch.bfloat16)`, `.half()` and the like still move them and still cast the others; a
    gradient is treated as its parameter is.
    """

    fp32_tensors: tuple[str, ...] = ()

    def _kept(self) -> Iterable[Tensor]:
        own = {**self._parameters, **self._buffers}
        for name in self.fp32_tensors:
            tensor = own[name]
            yield tensor
            if tensor.grad is not None:
                yield tensor.grad

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {id(tensor) for tensor in self._kept()}

        def keep(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) not in kept or not _narrower(applied.dtype, torch.float32):
                return applied
            return tensor.to(device=applied.device, dtype=torch.float32)

        # Children hold none of these tensors, so they see `fn` itself.
        super()._apply(keep, recurse=False)
        if recurse:
            for child in self.children():
                child._apply(fn)
        return self


def _narrower(dtype: torch.dtype, than: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize < than.itemsize


def at_least_fp32(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype such a tensor has in a module of `dtype` (None: torch's default)."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
