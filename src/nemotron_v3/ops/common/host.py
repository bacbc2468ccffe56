"""What the Triton forms share on the host: where they run, how they are registered, sizes.

Triton itself is imported by the kernels alone; this file can be read without it.
"""

import functools
import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from nemotron_v3.ops import compat

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_PLAIN = (Tensor, torch.nn.Parameter)

_library = torch.library.Library("nemotron_v3", "FRAGMENT")


_KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    list[bool]: "bool[]",
    torch.dtype: "ScalarType",
}


def schema(name: str, *arguments: type[tuple], results: int, mutated: str = "") -> str:
    """What `torch.library` calls the schema of an op.

    Args:
        arguments: NamedTuples of the op's arguments, one after the other; their annotations give
            the kinds.
        results: how many tensors the op returns.
        mutated: the argument that the op writes to.
    """
    kinds = {}
    for part in arguments:
        kinds |= {field: _KINDS[kind] for field, kind in get_type_hints(part).items()}
    if mutated:
        kinds[mutated] = "Tensor(a!)"
    listed = ", ".join(f"{kind} {field}" for field, kind in kinds.items())
    returned = ", ".join(["Tensor"] * results)
    return f"{name}({listed}) -> {returned if results == 1 else f'({returned})'}"


_Arguments = TypeVar("_Arguments", bound=tuple)


def gradients_of(arguments: type[_Arguments], **gradients: Tensor | None) -> _Arguments:
    """What an autograd formula returns: a gradient or None for each of the op's arguments."""
    return arguments(*[gradients.get(name) for name in arguments._fields])


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape, dtype and device of `x`."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def place_for(x: Tensor, wanted: bool) -> Tensor:
    """Where the gradient of `x` is written to; nothing where it is not wanted."""
    return torch.empty(x.shape if wanted else (0,), dtype=x.dtype, device=x.device)


def absent(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What an op returns for a result that there is not."""
    return like.new_empty(0, dtype=dtype)


def register(
    schema: str,
    run: Callable,
    fake: Callable,
    *,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """The op `nemotron_v3::NAME` that `torch.compile` sees as one node, as a function.

    `Library.define` rather than `custom_op`: the same op for half the host time of a call, and
    rather than `triton_op`, which does not run under Triton's interpreter.
    """
    name = schema.partition("(")[0]
    launch = on_device_of_first(run)
    _library.define(schema)
    _library.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nemotron_v3::{name}", fake, lib=_library)
    if backward is not None:
        backward = _once(backward)
        torch.library.register_autograd(
            f"nemotron_v3::{name}", backward, setup_context=setup_context, lib=_library
        )
    op = getattr(torch.ops.nemotron_v3, name).default
    function = None if backward is None else _function(launch, setup_context, backward)

    @functools.wraps(run)
    def call(*args: Any) -> Any:
        if compat.in_forward_mode():
            _refuse_tangents(name, args)
        if not can_bypass_dispatcher(args):
            return op(*args)
        if function is not None and torch.is_grad_enabled() and _any_requires_grad(args):
            return function.apply(*args)
        return launch(*args)

    return call


def _function(
    launch: Callable, setup_context: Callable, backward: Callable
) -> type[torch.autograd.Function]:
    """The op's autograd formula without the dispatcher: half the host time of a call."""

    def forward(ctx: Any, *args: Any) -> Any:
        outputs = launch(*args)
        setup_context(ctx, args, outputs)
        return outputs

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type("Eager", (torch.autograd.Function,), methods)


def _once(backward: Callable) -> Callable:
    """`backward`, whose results refuse to be differentiated again.

    Only a backward pass that makes a graph has gradients enabled; a compiler traces the plain one.
    """
    guarded = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *gradients)

    return run


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    """Kernels would drop them."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    if any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{name}: the Triton form has no forward-mode derivative: use impl='reference'"
        )


def can_bypass_dispatcher(args: tuple[Any, ...]) -> bool:
    """True if nothing needs to intercept the op: plain tensors in plain eager mode.

    A compiler, a dispatch mode (fake tensors, selective checkpointing), a function transform or a
    tensor subclass must see the op.
    """
    if torch.compiler.is_compiling() or compat.dispatch_modes():
        return False
    if compat.current_transform() is not None:
        return False
    # Lists, here and below: a generator costs a call of Python's for each argument.
    return not [a for a in args if isinstance(a, Tensor) and type(a) not in _PLAIN]


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    return bool([a for a in args if isinstance(a, Tensor) and a.requires_grad])


def on_device_of_first(run: Callable) -> Callable:
    """Launch on the device of the first argument: Triton launches on the current one."""

    @functools.wraps(run)
    def launch(x: Tensor, *args: Any) -> Any:
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return run(x, *args)
        with torch.cuda.device(x.device):
            return run(x, *args)

    return launch


# Found once, at import: `torch.compile` cannot look for packages, and warns of caches.
_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y")


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return _INTERPRETED


def installed() -> bool:
    return _INSTALLED


def can_launch(device: torch.device) -> bool:
    return installed() and (device.type == "cuda" or (device.type == "cpu" and interpreted()))


def programs(device: torch.device, per_multiprocessor: int) -> int:
    """How many programs of a kernel that keeps partial sums there are at most."""
    if device.type != "cuda":
        return 4
    return per_multiprocessor * _multiprocessors(device.index)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def unit_stride(x: Tensor | None) -> Tensor | None:
    """`x` with neighbouring elements along its last dimension: itself unless it lies otherwise."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def refuse_dtypes(dtypes: Iterable[torch.dtype | None]) -> str | None:
    """Why kernels cannot take tensors of these dtypes, or None: each has at most 32 bits.

    None stands for an absent tensor.
    """
    for dtype in dtypes:
        if dtype is not None and dtype not in DTYPES:
            return f"it computes in fp32, and {dtype} is asked for"
    return None


def refuse_mixed(dtypes: Iterable[torch.dtype]) -> str | None:
    """Why kernels cannot take tensors of these dtypes together, or None: one of `DTYPES`."""
    kinds = sorted(set(map(str, dtypes)))
    if len(kinds) > 1:
        return f"its tensors have the dtypes {', '.join(kinds)}: one is needed"
    return refuse_dtypes(dtypes)


def refuse_state(dtype: torch.dtype, head_dim: int, state: int) -> str | None:
    """Why a state of this size cannot stand in a program's shared memory and registers, or None."""
    most = 128 * 128 if dtype == torch.float32 else 128 * 256
    if head_dim <= 128 and state <= 256 and power_of_two(head_dim) * power_of_two(state) <= most:
        return None
    return (
        f"a state of {head_dim} x {state} in {dtype} does not fit into one program (at most "
        "128 x 256 in 16 bits, 128 x 128 in fp32)"
    )
