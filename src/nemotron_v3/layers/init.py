"""How every parameter is drawn: one function, and the building blocks of `init_weights`."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_(
    name: str,
    tensor: Tensor,
    *,
    std: float,
    shrink: float = 1.0,
    time_step: tuple[float, float, float] | None = None,
) -> None:
    """Fill one parameter or buffer in place, by the last part of its name.

    | tensor | drawn from |
    |---|---|
    | `*.bias`, `e_score_correction_bias` | 0 |
    | norm weights (one dimension), `D` | 1 |
    | `A_log` | log(1), ..., log(heads) |
    | `dt_bias` | inverse softplus of a log-uniform draw in `time_step` |
    | conv1d weight, W taps | uniform(-1/sqrt(W), 1/sqrt(W)), PyTorch's default |
    | other weights (linear, embedding, expert, router) | N(0, std^2) |
    | out_proj, o_proj, every down_proj | N(0, (std / shrink)^2) |

    Args:
        name: the tensor's name within its layer, such as `out_proj.weight`.
        tensor: filled in place. For a sharded one (a DTensor) every process must call this: the
            first draws the whole tensor, and each keeps its part of that draw.
        std: the config's `initializer_range`.
        shrink: divides the spread of a projection back into the residual stream (Radford et al.
            2019, GPT-2); drawing anew, not dividing, is what makes a second call harmless.
        time_step: (time_step_min, time_step_max, time_step_floor), needed for `dt_bias`.

    Raises:
        ValueError: a `dt_bias` without `time_step`.
    """
    if hasattr(tensor, "device_mesh"):
        sharded: Any = cast(Any, tensor)  # whose class this room does not import
        whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=sharded.to_local().device)
        _draw(name, whole, std, shrink, time_step)
        # Without placements it is replicated: a checked one is sent from the first process.
        tensor.copy_(type(sharded).from_local(whole, sharded.device_mesh, run_check=True))
    else:
        _draw(name, tensor, std, shrink, time_step)


def _draw(
    name: str,
    tensor: Tensor,
    std: float,
    shrink: float,
    time_step: tuple[float, float, float] | None,
) -> None:
    parts = name.split(".")
    if parts[-1] in ("bias", "e_score_correction_bias"):
        tensor.zero_()
    elif parts[-1] == "A_log":
        heads = torch.arange(1, tensor.shape[0] + 1, dtype=tensor.dtype, device=tensor.device)
        tensor.copy_(heads.log())
    elif parts[-1] == "dt_bias":
        if time_step is None:
            raise ValueError(f"{name} is drawn by time_step, which is None: give its three numbers")
        low, high, floor = time_step
        dt = torch.empty_like(tensor).uniform_(math.log(low), math.log(high)).exp_()
        dt.clamp_(min=floor)
        tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
    elif tensor.dim() == 1:
        tensor.fill_(1)
    elif "conv1d" in parts:
        bound = 1 / math.sqrt(tensor.shape[-1])
        tensor.uniform_(-bound, bound)
    else:
        into_stream = any(part in ("out_proj", "o_proj", "down_proj") for part in parts)
        tensor.normal_(0, std / shrink if into_stream else std)


def init_module(
    module: nn.Module,
    *,
    std: float,
    num_hidden_layers: int,
    rescale_prenorm_residual: bool,
    time_step: tuple[float, float, float] | None = None,
    buffer_device: torch.device | None = None,
) -> None:
    """Draw all parameters and buffers of one layer.

    Args:
        module: any of the four mixers.
        buffer_device: move the layer there first; from the meta device, None means the CPU.
        std, num_hidden_layers, rescale_prenorm_residual, time_step: see `init_`.

    Raises:
        ValueError: a negative number of layers.
    """
    if num_hidden_layers < 0:
        raise ValueError(f"num_hidden_layers must not be negative, got {num_hidden_layers}")
    place_on(module, buffer_device)
    shrink = math.sqrt(max(num_hidden_layers, 1)) if rescale_prenorm_residual else 1.0
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        init_(name, tensor, std=std, shrink=shrink, time_step=time_step)


def place_on(module: nn.Module, device: torch.device | None) -> None:
    """Put a module where its values will be drawn: `device`, or the CPU if it has no storage."""
    if on_meta(module):
        module.to_empty(device=device or "cpu")
    elif device is not None:
        module.to(device)


def on_meta(module: nn.Module) -> bool:
    """Whether the module was built without storage, so that there is nothing to draw yet."""
    return any(t.is_meta for t in [*module.parameters(), *module.buffers()])
