"""How an op of experts is held to keep what is not a number where it belongs."""

from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops

SPOILT = ("x", "weights", "dy")


def hold_isolation(op: str, inputs: Any, spoilt: str, impl: str) -> None:
    """A NaN in one token's `x`, routing weights or cotangent reaches nothing but that token, and
    of the matrices' gradients those of its own experts; checked bit by bit.

    Each expert's first token is spoilt in turn: its row follows the last one of the expert before.
    """
    indices = inputs.options["indices"]
    dy = torch.randn(indices.shape[0], inputs.tensors["x"].shape[1]).to(inputs.tensors["x"])
    clean = _results(op, inputs.tensors, inputs.options, dy, impl)
    assert all(torch.isfinite(t).all() for t in clean.values())
    for expert in indices.unique().tolist():
        token = int((indices == expert).any(1).nonzero()[0])
        tensors = {k: t.clone() for k, t in inputs.tensors.items()} | {"dy": dy.clone()}
        tensors[spoilt][token] = float("nan")
        found = _results(op, tensors, inputs.options, tensors.pop("dy"), impl)
        assert found["y"][token].isnan().all() or spoilt == "dy", expert
        others = torch.arange(len(indices), device=dy.device) != token
        for name in ("y", "x", "weights"):
            assert torch.equal(found[name][others], clean[name][others]), (name, expert)
        E = inputs.tensors["up_proj"].shape[0]
        own = torch.zeros(E, dtype=torch.bool, device=dy.device)
        own[indices[token]] = True
        for name in inputs.tensors.keys() - {"x", "weights"}:
            assert torch.equal(found[name][~own], clean[name][~own]), (name, expert)
            assert not torch.equal(found[name][own], clean[name][own]), (name, expert)


def _results(
    op: str, tensors: dict[str, Tensor], options: dict[str, Any], dy: Tensor, impl: str
) -> dict[str, Tensor]:
    leaves = {k: t.detach().requires_grad_() for k, t in tensors.items()}
    y = getattr(ops, op)(**leaves, **options, impl=impl)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
    )
