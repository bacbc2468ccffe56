"""A weight of a module that stays in 8 or 4 bits, and has its values only while they are used.

It takes a parameter's place under the parameter's name, shape and dtype. What multiplies by it gets
its values, for as long as the product takes; what a backward pass keeps of it is the codes. It is
frozen: adapters are trained beside it.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from nemotron_v3.layers.dequantise import dequantise


class NarrowParts(NamedTuple):
    """The tensors of a weight `[N, K]`, or of a stack `[E, N, K]`: see `dequantise`."""

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "NarrowParts":
        codes, scale, whole = self
        return NarrowParts(
            function(codes), function(scale), None if whole is None else function(whole)
        )


class NarrowWeight(Tensor):
    """A weight `[N, K]`, or a stack `[E, N, K]`, held as codes and scales.

    Every op that is not known here computes with the values. In place nothing changes it.

    Args:
        parts: codes, scales and global scales, on one device.
        divides: whether the global scale is the reciprocal of a factor.
        dtype: of the values, rounded to once.
    """

    parts: NarrowParts
    divides: bool

    @staticmethod
    def __new__(
        cls: type["NarrowWeight"], parts: NarrowParts, divides: bool, dtype: torch.dtype
    ) -> "NarrowWeight":
        *rows, columns = parts.codes.shape
        width = 2 * columns if parts.codes.dtype == torch.uint8 else columns
        return Tensor._make_wrapper_subclass(
            cls, (*rows, width), dtype=dtype, device=parts.codes.device, requires_grad=False
        )

    def __init__(self, parts: NarrowParts, divides: bool, dtype: torch.dtype):
        self.parts = parts
        self.divides = divides

    def values(self) -> Tensor:
        """The weight as a plain tensor of its dtype."""
        return _values(self.parts, self.divides, self.dtype)

    def rows(self, index: Tensor) -> Tensor:
        """The values of some rows of a weight `[N, K]`, of `index`'s shape and `[K]`."""
        codes, scale, global_scale = self.parts
        tall = codes.shape[0] // scale.shape[0] if scale.shape[0] > 1 else 0
        flat = index.reshape(-1)
        own = scale[flat // tall] if tall else scale
        parts = NarrowParts(codes[flat], own, global_scale)
        return _values(parts, self.divides, self.dtype).view(*index.shape, self.shape[-1])

    @property
    def nbytes_held(self) -> int:
        """The bytes of its codes and scales."""
        return sum(part.nbytes for part in self.parts if part is not None)

    def with_parts(self, parts: NarrowParts, dtype: torch.dtype | None = None) -> "NarrowWeight":
        return NarrowWeight(parts, self.divides, dtype or self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        kind = "nvfp4" if self.parts.codes.dtype == torch.uint8 else "fp8"
        return f"NarrowWeight({kind}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        held = [name for name, part in self.parts._asdict().items() if part is not None]
        return [f"_{name}" for name in held], (self.divides, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, *_: Any) -> "NarrowWeight":
        return NarrowWeight(
            NarrowParts(inner["_codes"], inner["_scale"], inner.get("_global_scale")), *context
        )

    @property
    def _codes(self) -> Tensor:
        return self.parts.codes

    @property
    def _scale(self) -> Tensor:
        return self.parts.scale

    @property
    def _global_scale(self) -> Tensor | None:
        return self.parts.global_scale

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not isinstance(args[0], NarrowWeight):
            return _linear(*args, **kwargs)
        if func is F.embedding and isinstance(args[1], NarrowWeight):
            return _embedding(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _KEPT.get(func)
        if handler is not None and isinstance(args[0], NarrowWeight):
            return handler(*args, **kwargs)
        if any(
            isinstance(value, NarrowWeight) and argument.alias_info is not None
            and argument.alias_info.is_write
            for value, argument in zip(args, func._schema.arguments, strict=False)
        ):  # fmt: skip
            raise RuntimeError(
                f"{func} would write into a weight in 8 or 4 bits, whose values follow from its "
                "codes: load the checkpoint wide (narrow=False) to change its weights"
            )
        args = pytree.tree_map_only(NarrowWeight, NarrowWeight.values, args)
        named: Any = pytree.tree_map_only(NarrowWeight, NarrowWeight.values, kwargs)
        return func(*args, **cast(dict[str, Any], named))


AT_ONCE = 2**26
"""Elements that are given their values at once: in fp32 on the way, where the whole would be
several times what is asked for."""


def _values(parts: NarrowParts, divides: bool, dtype: torch.dtype) -> Tensor:
    codes, scale, global_scale = parts
    length, *shape = codes.shape
    step = max(1, AT_ONCE // max(1, math.prod(shape)))
    with torch.no_grad():
        if length <= step:
            return dequantise(*parts, divides=divides, dtype=dtype)
        shape[-1] *= 2 if codes.dtype == torch.uint8 else 1
        values = codes.new_empty((length, *shape), dtype=dtype)
        # Along the experts of a stack, or the rows of one weight, whole tiles of them.
        stack = codes.dim() == 3
        tall = length // scale.shape[0] if scale.shape[0] > 1 else 0
        step = max(1, step // tall) * tall if tall else step
        for start in range(0, length, step):
            some = slice(start, start + step)
            own = scale[start // tall : -(-(start + step) // tall)] if tall else scale
            each = global_scale[some] if stack and global_scale is not None else global_scale
            values[some] = dequantise(codes[some], own, each, divides=divides, dtype=dtype)
        return values


class _Linear(torch.autograd.Function):
    """`x W^T`, which keeps the codes of W for its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NarrowWeight, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        return F.linear(x.to(dtype), weight.values().to(dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        return dy @ ctx.weight.values().to(ctx.dtype), None, None


def _linear(input: Tensor, weight: NarrowWeight, bias: Tensor | None = None) -> Tensor:
    _refuse_training(weight)
    kind = input.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
    if not autocast and input.dtype != dtype:
        raise RuntimeError(f"the input is {input.dtype}, the weight {dtype}: cast one of them")
    y = _Linear.apply(input, weight, dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _embedding(input: Tensor, weight: NarrowWeight, *args: Any, **kwargs: Any) -> Tensor:
    settings = dict(zip(("padding_idx", "max_norm"), args, strict=False)) | kwargs
    if settings.get("max_norm") is not None:
        raise RuntimeError("max_norm would write into a weight in 8 or 4 bits: leave it out")
    _refuse_training(weight)
    return weight.rows(input)


def _refuse_training(weight: NarrowWeight) -> None:
    if weight.requires_grad:
        raise RuntimeError(
            "a weight in 8 or 4 bits is frozen: requires_grad_(False), and train adapters beside "
            "it; or load the checkpoint wide (narrow=False)"
        )


def wide(weight: Tensor) -> Tensor:
    """`weight`, or the values of a narrow one."""
    if not isinstance(weight, NarrowWeight):
        return weight
    _refuse_training(weight)
    return weight.values()


class keeping_codes(torch.autograd.graph.saved_tensors_hooks):
    """Within this context a backward pass keeps the codes of `narrow` where it would keep `values`,
    or a view of them, and gives them their values again when it needs them.

    Args:
        pairs: each narrow weight, and its values in use.
    """

    def __init__(self, *pairs: tuple[Tensor, Tensor]):
        held = {
            values.untyped_storage().data_ptr(): narrow
            for narrow, values in pairs
            if isinstance(narrow, NarrowWeight)
        }

        def pack(tensor: Tensor) -> Any:
            if type(tensor) is not Tensor or tensor.device.type == "meta":
                return tensor
            narrow = held.get(tensor.untyped_storage().data_ptr())
            if narrow is None:
                return tensor
            return narrow, tensor.shape, tensor.stride(), tensor.storage_offset()

        # Views of one weight, an expert each perhaps, get it once as long as one of them lives.
        last: dict[int, weakref.ref] = {}

        def unpack(kept: Any) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            narrow, shape, stride, offset = kept
            alive = last.get(id(narrow), lambda: None)()
            values = narrow.values() if alive is None else alive
            last[id(narrow)] = weakref.ref(values)
            return values.as_strided(shape, stride, offset)

        super().__init__(pack, unpack)


# ----------------------------------------------------------------- what leaves a weight narrow

_aten = torch.ops.aten


def _same(weight: NarrowWeight, *_: Any, **__: Any) -> NarrowWeight:
    return weight.with_parts(weight.parts)


def _clone(weight: NarrowWeight, **_: Any) -> NarrowWeight:
    return weight.with_parts(weight.parts.map(Tensor.clone))


def _to_copy(weight: NarrowWeight, **kwargs: Any) -> NarrowWeight:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    copied = weight.parts.map(lambda part: part.to(device or part.device, copy=True))
    return weight.with_parts(copied, dtype)


def _select(weight: NarrowWeight, dim: int, index: int) -> Tensor:
    if dim != 0 or weight.dim() != 3:
        return weight.values().select(dim, index)
    return weight.with_parts(weight.parts.map(lambda part: part[index]))


_KEPT: dict[Any, Callable] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.select.int: _select,
}
