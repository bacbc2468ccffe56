"""Names of PyTorch and Triton that are not public, each with what it is used for.

A release may change them: `tests/ops/test_compat.py` says what is expected of each, and that ops
use no other.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd
from torch._C._functorch import TransformType, get_interpreter_stack, peek_interpreter_stack
from torch.autograd import forward_ad

# The current stream of a CUDA device by its index, without an object around it; absent from builds
# without CUDA.
current_raw_stream: Callable[[int], int] | None = getattr(
    torch._C, "_cuda_getCurrentRawStream", None
)


# The innermost transform of torch.func, functionalisation included, or None; and how many dispatch
# modes see each operation (fake tensors, selective checkpointing); and whether autocast is on for
# any kind of device. Plain aliases: every op asks.
current_transform = peek_interpreter_stack
dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
autocast_somewhere: Callable[[], bool] = torch._C._is_any_autocast_enabled


def in_derivative_or_batch() -> bool:
    """Whether torch.func asks for derivatives or batches."""
    if current_transform() is None:
        return False
    transforms = (TransformType.Grad, TransformType.Jvp, TransformType.Vmap)
    return any(layer.key() in transforms for layer in get_interpreter_stack() or ())


def in_forward_mode() -> bool:
    """Whether tensors may have tangents."""
    return forward_ad._current_level >= 0


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now leaves its graph for another one."""
    return _autograd._get_current_graph_task_keep_graph()


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x weight^T` in fp32 by oneDNN; `weight` may be what `onednn_packed` returned."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def onednn_packed(weight: Tensor, rows: int) -> Tensor:
    """A weight in the order in which oneDNN multiplies `rows` rows by it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def launch_is_hooked() -> bool:
    """Whether a profiler has hooked Triton's launches."""
    runtime = _triton_runtime()
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


@functools.cache
def _triton_runtime() -> Any:
    from triton.knobs import runtime

    return runtime
