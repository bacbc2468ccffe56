"""A kernel that is launched before the one in front of it has ended.

On a Hopper GPU a grid may be set up while the last programs of the one before it run (programmatic
dependent launch). Every kernel of a step that is launched so begins with `start_early`, behind
which all results of those before it are there. None of them lets its successor in before its own
end: that was slower, for the successor's programs take the places that its own would have.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def start_early(PDL: tl.constexpr):
    if PDL:
        gdc_wait()


def early(device: torch.device) -> dict[str, bool]:
    """The options of such a launch on this device."""
    return {"PDL": True, "launch_pdl": True} if _can(device) else {"PDL": False}


@functools.cache
def _can(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
