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
AT_ONCE = 2**26  # elements that are updated at once
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
        count, (beta1, beta2) = state["count"], group["betas"]
        corrections = 1 - beta1**count, 1 - beta2**count
        told = [group["lr"], beta1, beta2, group["eps"], group["weight_decay"], *corrections]
        numbers = torch.tensor(told, dtype=torch.float32, device=local.device)
        step = _compiled() if local.is_cuda else _step
        values = torch.empty(local.shape, dtype=torch.float32, device=local.device)
        gradient = local_part(p.grad).contiguous()  # type: ignore[arg-type]
        flat = [t.view(-1) for t in (values, local, gradient)]
        for first, last in _chunks(local.numel(), block):
            first_moment, second_moment = (
                self._moment(state, name, block, first, last) for name in MOMENTS
            )
            new, weight, change = (t[first:last] for t in flat)
            new.copy_(step(weight, change, first_moment, second_moment, numbers))
        self._write(p, values)

    def _moment(
        self, state: dict[str, Any], name: str, block: int, first: int, last: int
    ) -> Tensor:
        """Some elements of a moment, as torchao's tensor over the codes and scales of the state."""
        codes = local_part(state[name]).view(-1)[first:last]
        scale = local_part(state[f"{name}_scale"]).view(-1)[first // block : last // block]
        signed = name == "exp_avg"
        return self._kind(codes, scale, self._values(signed, codes.device), signed)

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


def _chunks(numel: int, block: int) -> Iterator[tuple[int, int]]:
    """Borders of parts that are whole blocks."""
    size = AT_ONCE // block * block
    return ((first, min(numel, first + size)) for first in range(0, numel, size))


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
    weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, numbers: Tensor
) -> Tensor:
    """The new weights in fp32; the moments `first` and `second` are changed in place."""
    rate, beta1, beta2, eps, decay, correction1, correction2 = numbers.unbind(0)
    gradient = gradient.float()
    mean = gradient + beta1 * (first.dequantize() - gradient)
    square = gradient.square() + beta2 * (second.dequantize() - gradient.square())
    update = (mean / correction1) / ((square / correction2).sqrt() + eps)
    new = weight.float() * (1 - rate * decay) - rate * update
    first.copy_(mean)
    second.copy_(square)
    return new


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    """As a few kernels: one element is read and written a dozen times otherwise."""
    return torch.compile(_step, dynamic=False)
