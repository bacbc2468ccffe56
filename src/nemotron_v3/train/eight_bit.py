"""AdamW with moments of 8 bits, in blocks that no way of sharding cuts.

Dettmers et al. 2022 (arXiv 2110.02861): a block of moments has a scale, its largest value, and each
moment the number of one of 256 parts of it. torchao keeps and rounds them. Here a block lies within
a row of its tensor, and what belongs to a row lies where the row does: an optimiser's state is
whole tensors of codes and scales, of which a process holds its rows, so that a save is loaded
however the model is shared.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nemotron_v3.train.optimizer import RoundedAdamW, local_part

LARGEST, SMALLEST = 256, 32  # elements of a block
FEW = 4096  # elements of a tensor that has moments in fp32, as one without a block has
AT_ONCE = 2**28  # elements that are updated at once
MOMENTS = ("exp_avg", "exp_avg_sq")


def block_of(shape: tuple[int, ...]) -> int | None:
    """Elements of a block in the rows of a tensor, or None where it has moments in fp32.

    It depends on the whole tensor's shape alone.
    """
    if len(shape) < 2 or math.prod(shape) < FEW:
        return None
    block = math.gcd(shape[-1], LARGEST)
    return block if block >= SMALLEST else None


class EightBitAdamW(RoundedAdamW):
    """`RoundedAdamW` whose moments are codes of 8 bits beside a scale a block.

    Raises:
        ValueError: no torchao.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        try:
            from torchao.optim.subclass_8bit import OptimState8bit
        except ImportError:
            raise ValueError(
                "moments of 8 bits need torchao: pip install torchao, or give optimizer.moments = "
                "'float32'"
            ) from None
        self._kind = OptimState8bit
        self._parts: dict[tuple[bool, torch.device], Tensor] = {}
        self._told: Any = None
        self._filled = torch.empty(0)
        super().__init__(*args, **kwargs)

    def _update(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> None:
        narrow = [p for p in bucket if block_of(tuple(p.shape)) is not None]
        wide = [p for p in bucket if block_of(tuple(p.shape)) is None]
        if wide:
            super()._update(group, wide)
        for p in narrow:
            self._update_blocks(group, p)

    def _update_blocks(self, group: dict[str, Any], p: nn.Parameter) -> None:
        state, block = self._state_of(p), block_of(tuple(p.shape)) or 1
        local = local_part(p)
        if not local.numel():
            return
        numbers = self._numbers(group, state["count"], local.device)
        step: Callable[..., Tensor] = _compiled() if local.is_cuda else _step
        values = torch.empty(local.shape, dtype=torch.float32, device=local.device)
        gradient = local_part(p.grad).contiguous()  # type: ignore[arg-type]
        codes = [local_part(state[name]) for name in MOMENTS]
        scales = [local_part(state[f"{name}_scale"]).view(-1) for name in MOMENTS]
        blocks = [t.view(-1, block) for t in (values, local, gradient, *codes)]
        parts = [self._values(signed, local.device) for signed in (True, False)]
        for rows in _chunks(len(blocks[0]), block):
            new, *others = (t[rows] for t in (*blocks, *scales))
            if local.is_cuda:
                for tensor in others:  # one graph for any number of blocks
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
            new.copy_(step(*others, *parts, numbers))
        self._write(p, values)

    def _numbers(self, group: dict[str, Any], count: int, device: torch.device) -> Tensor:
        """What a step is told, filled in on the device once for all tensors of a group."""
        beta1, beta2 = group["betas"]
        corrections = 1 - beta1**count, 1 - beta2**count
        told = (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        told = (*told, *corrections, self.scale)
        if self._told != (told, device):
            self._told = told, device
            filled = [torch.full((), n, dtype=torch.float32, device=device) for n in told]
            self._filled = torch.stack(filled)
        return self._filled

    def _values(self, signed: bool, device: torch.device) -> Tensor:
        """What the codes stand for, as parts of a block's scale."""
        key = signed, device
        if key not in self._parts:
            some = self._kind.zeros((LARGEST,), signed, LARGEST, device=device)
            self._parts[key] = some.qmap
        return self._parts[key]

    def _new_state(self, p: nn.Parameter) -> dict[str, Any]:
        block = block_of(tuple(p.shape))
        if block is None:
            return super()._new_state(p)
        _check_rows(p)
        state: dict[str, Any] = {"count": 0}
        for name in MOMENTS:
            state[name] = torch.zeros_like(p, dtype=torch.uint8)
            state[f"{name}_scale"] = _scales(p, block)
        return state


def _chunks(blocks: int, block: int) -> Iterator[slice]:
    """So many blocks in parts that are updated at once."""
    size = max(1, AT_ONCE // block)
    return (slice(first, first + size) for first in range(0, blocks, size))


def _scales(p: Tensor, block: int) -> Tensor:
    """One for each block, 0, where the block is."""
    shape = (*p.shape[:-1], p.shape[-1] // block)
    if not isinstance(p, DTensor):
        return torch.zeros(shape, dtype=torch.float32, device=p.device)
    local = p.to_local()
    own = torch.zeros(
        (*local.shape[:-1], local.shape[-1] // block), dtype=torch.float32, device=local.device
    )
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        own, p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def _check_rows(p: Tensor) -> None:
    """Raises ValueError for a tensor whose rows are cut."""
    cut = isinstance(p, DTensor) and any(
        isinstance(placement, Shard) and placement.dim == p.dim() - 1 for placement in p.placements
    )
    if cut:
        raise ValueError(
            f"a tensor {tuple(p.shape)} is shared within its rows, which moments of 8 bits may not "
            "be: give optimizer.moments = 'float32', or another plan"
        )


def _step(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    first_scale: Tensor,
    second_scale: Tensor,
    signed: Tensor,
    unsigned: Tensor,
    numbers: Tensor,
) -> Tensor:
    """The new weights in fp32, n blocks `[n, B]`; the moments are changed in place.

    Args:
        first, second: codes of the moments, uint8 `[n, B]`, beside their scales `[n]`.
        signed, unsigned: what the codes stand for, `[256]`.
        numbers: rate, both betas, eps, decay, how far the moments' weights have come, and what
            the gradient is multiplied by.
    """
    from torchao.optim.quant_utils import (
        dequant_with_qmap,
        quantize_8bit_with_qmap,
        scale_tensor,
    )

    rate, beta1, beta2, eps, decay, correction1, correction2, shorter = numbers.unbind(0)
    gradient = gradient.float() * shorter
    mean = dequant_with_qmap(first, signed, first_scale)
    square = dequant_with_qmap(second, unsigned, second_scale)
    mean = gradient + beta1 * (mean - gradient)
    square = gradient.square() + beta2 * (square - gradient.square())
    update = (mean / correction1) / ((square / correction2).sqrt() + eps)
    moments = ((first, first_scale, signed, mean), (second, second_scale, unsigned, square))
    for codes, scale, parts, value in moments:
        scaled, largest = scale_tensor(value, value.shape[1])
        codes.copy_(quantize_8bit_with_qmap(scaled, parts))
        scale.copy_(largest)
    return weight.float() * (1 - rate * decay) - rate * update


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """As a few kernels: one element is read and written a dozen times otherwise."""
    return torch.compile(_step)
