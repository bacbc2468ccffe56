"""How a Triton form is held to the accuracy rule: on a CPU (interpreted) and on a GPU alike."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from tests.accuracy import PlainPyTorch, Report, check

CHUNKED = ("ssd", "mamba2")


def hold(op: str, case: Any, dtype: torch.dtype, device: str) -> Report:
    """Outputs and all gradients of `impl="triton"` by the rule.

    "Plain PyTorch" of a scan in 16 bits is the portable form with its products' operands rounded:
    it rounds what any form by chunks has to round (decayed inputs, states between chunks), and
    the recurrence step by step does not.
    """
    room = f"nemotron_v3.ops.{op}"
    cases = import_module(f"{room}.cases")
    reference = getattr(import_module(f"{room}.reference"), op)
    portable = getattr(import_module(f"{room}.portable"), op)
    # The router's products are fp32 by contract.
    plain = PlainPyTorch(reference, dtype, operands=torch.float32 if op == "router" else None)
    if op in CHUNKED and dtype != torch.float32:
        plain = PlainPyTorch(lambda dtype, **arguments: portable(**arguments), dtype)

    def function(**arguments: Any) -> Any:
        return getattr(ops, op)(**arguments, impl="triton")

    return check(
        function,
        reference,
        lambda generator: cases.make_inputs(case, dtype, device, generator),
        dtype=dtype,
        plain=plain,
        long_decay=getattr(case, "decay", "usual") in ("long", "mixed"),
    )


def results(op: str, inputs: Any, impl: str = "triton") -> list[Tensor]:
    """Outputs and gradients on fixed cotangents, for comparisons bit by bit."""
    leaves = {k: t.detach().requires_grad_() for k, t in inputs.tensors.items() if t is not None}
    outputs = getattr(ops, op)(
        **{k: leaves.get(k) for k in inputs.tensors}, **inputs.options, impl=impl
    )
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    cotangents = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, o.dtype)
        for o in outputs
    ]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents, allow_unused=True)
    return [*(o.detach() for o in outputs), *(g for g in gradients if g is not None)]
