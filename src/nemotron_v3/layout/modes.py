"""Tensors that outlive a call: made outside inference mode, and brought to a device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run outside inference mode and without a graph if it is called inside.

    A tensor made in inference mode can be neither written to nor saved for a backward pass outside
    of it. What is kept beyond a call must not depend on where the call came from.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # A compiler, which cannot ask for the mode, keeps nothing itself.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def kept(tensor: Tensor) -> Tensor:
    """`tensor` itself, or a copy made outside inference mode of one made inside."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def capturing(device: torch.device) -> bool:
    """Whether work on `device` is recorded into a graph now, so that it is done at a replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def on_device(values: Sequence[int] | Tensor, device: torch.device | str | None) -> Tensor:
    """int64 values of the host, on `device`, without waiting for what the device does now."""
    device = torch.get_default_device() if device is None else torch.device(device)
    values = torch.as_tensor(values, dtype=torch.int64, device="cpu")
    if device.type != "cuda":
        return values.to(device)
    # A copy from other memory would wait until the device has done all that it was given.
    return values.pin_memory().to(device, non_blocking=True)


class once(Generic[R]):
    """A property computed once; then it is an attribute, which costs no call.

    `functools.cached_property` takes a lock that `torch.compile` cannot trace.
    """

    def __init__(self, function: Callable[[Any], R]):
        self.function: Callable[[Any], R] = function
        self.name: str = function.__name__
        self.__doc__ = function.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> R:
        if instance is None:
            return cast(R, self)
        if torch.compiler.is_compiling():
            return self.function(instance)
        if torch.is_inference_mode_enabled():
            value = outside_inference_mode(self.function)(instance)
        else:
            value = self.function(instance)
        if not (isinstance(value, Tensor) and capturing(value.device)):
            instance.__dict__[self.name] = value
        return value
