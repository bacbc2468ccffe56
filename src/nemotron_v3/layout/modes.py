"""The mode a caller is in, where tensors are made that outlive it."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor


def ordinary(function: Callable) -> Callable:
    """`function`, the tensors it makes being ordinary ones even in inference mode.

    A tensor made in inference mode can be neither written to nor saved for a backward pass outside
    of it. What is kept beyond a call must not depend on where the call came from.
    """

    @functools.wraps(function)
    def run(*args, **kwargs):
        # A compiler, which cannot ask for the mode, keeps nothing itself.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


def kept(tensor: Tensor) -> Tensor:
    """`tensor` as it may outlive a call: an ordinary copy of one that inference mode has made."""
    if torch.compiler.is_compiling() or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def capturing(device: torch.device) -> bool:
    """Whether work on `device` is recorded into a graph now, so that it is done at a replay."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
