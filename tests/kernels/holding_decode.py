"""How the forms of ops on fixed buffers are held to the accuracy rule, wherever they run.

They write to their buffers: results are compared together with what the buffers hold afterwards.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.ops.common.cases import Inputs
from tests.accuracy import PlainPyTorch, Report, check

BUFFERS = {"decode_attention": ("keys", "values"), "decode_mamba2": ("conv", "ssm")}


def on_copies(op: str, run: Callable[..., Any], **arguments: Any) -> dict[str, Tensor]:
    """The op's result, and its buffers after it. Decoding has no gradient."""
    given = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    buffers = {name: given[name].clone() for name in BUFFERS[op]}
    out = run(**(given | buffers))
    return {"out": out, **buffers}


def hold(op: str, case: Any, dtype: torch.dtype, device: str, impl: str) -> Report:
    """The form `impl` by the rule; plain PyTorch hands tensors on in the model's dtype."""
    room = f"nemotron_v3.ops.{op}"
    cases = import_module(f"{room}.cases")
    truth = partial(on_copies, op, getattr(import_module(f"{room}.reference"), op))
    plain = partial(truth, activation_dtype=dtype) if op == "decode_mamba2" else truth
    return check(
        partial(on_copies, op, _form(op, impl)),
        truth,
        lambda generator: cases.make_inputs(case, dtype, device, generator),
        dtype=dtype,
        plain=PlainPyTorch(plain, dtype),
        long_decay=getattr(case, "decay", "usual") == "long",
    )


def results(op: str, inputs: Inputs, impl: str, **changes: Any) -> dict[str, Tensor]:
    """Result and buffers, for comparisons bit by bit."""
    arguments = {**inputs.tensors, **inputs.options, **changes}
    return on_copies(op, _form(op, impl), **arguments)


def _form(op: str, impl: str) -> Callable[..., Tensor]:
    return lambda **arguments: getattr(ops, op)(**arguments, impl=impl)
