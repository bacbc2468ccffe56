"""How the forms of skinny_linear and decode_experts are held to the accuracy rule, anywhere."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.ops.common.cases import Inputs
from nemotron_v3.ops.decode_experts import Buffers, Updates
from nemotron_v3.ops.decode_experts import cases as expert_cases
from nemotron_v3.ops.decode_experts import reference as expert_reference
from nemotron_v3.ops.skinny_linear import LowRank, Norm, cases, reference
from tests.accuracy import PlainPyTorch, Report, check

Choice = dict[str, Tensor]


def linear(run: Callable[..., Tensor], *, group: int, wide_stream: bool, **tensors: Any) -> Tensor:
    """`run` as the reference is called, from the tensors of a case. There are no gradients."""
    given = {k: t if t is None else t.detach() for k, t in tensors.items()}
    weights = tuple(given[name] for name in sorted(given) if name.startswith("weight"))
    biases = tuple(given[name] for name in sorted(given) if name.startswith("bias"))
    x, residual, gain = (given[name] for name in ("x", "residual", "gain"))
    dtype = weights[0].dtype
    dtype = torch.promote_types(dtype, torch.float32) if wide_stream else dtype
    m = sum(map(len, weights))
    out = torch.full((len(x), m), torch.nan, dtype=dtype, device=x.device)
    if residual is not None:  # a step adds to the stream in place
        residual = out.copy_(residual)
    norm = None if gain is None else Norm(gain, 1e-5, group)
    updates = [update(given[f"a_{i}"], given[f"b_{i}"]) for i in range(3) if f"a_{i}" in given]
    given = {"norm": norm, "residual": residual, "low_rank": tuple(updates) or None}
    return run(x, weights, biases, **given, out=out)


def update(a: Tensor | None, b: Tensor | None) -> LowRank | None:
    return None if a is None else LowRank(a, b, 0.75)


def form(impl: str) -> Callable[..., Tensor]:
    def run(x: Tensor, weights: Any, biases: Any, **options: Any) -> Tensor:
        return ops.skinny_linear(x, *weights, biases=biases, **options, impl=impl)

    return run


def hold_linear(case: cases.Case, dtype: torch.dtype, device: str, impl: str) -> Report:
    """By the rule; plain PyTorch's linear layers return rounded values."""

    def truth(dtype: torch.dtype = torch.float64, **arguments: Any) -> Tensor:
        return linear(partial(reference.skinny_linear, dtype=dtype), **arguments)

    return check(
        partial(linear, form(impl)),
        truth,
        lambda generator: cases.make_inputs(case, dtype, device, generator),
        dtype=dtype,
        plain=PlainPyTorch(truth, dtype, results=True),
    )


def routed(
    run: Callable[..., None],
    *,
    case: expert_cases.Case,
    active: Tensor,
    stream: Tensor,
    gain: Tensor,
    gate: Tensor,
    bias: Tensor,
    **others: Any,
) -> Buffers:
    """The buffers behind `route`."""
    buffers = case.buffers(gate.detach())
    router = case.router(gain.detach(), gate.detach(), bias.detach())
    run(stream.detach(), router, active, buffers)
    return buffers


def hold_route(case: expert_cases.Case, dtype: torch.dtype, device: str, impl: str) -> None:
    """Norm and logits by the rule; the choice, from the form's own logits on, exactly."""

    def logits(run: Callable[..., None], **arguments: Any) -> Choice:
        buffers = routed(run, **arguments)
        return {"normed": buffers.normed, "logits": buffers.logits}

    def truth(dtype: torch.dtype = torch.float64, **arguments: Any) -> Choice:
        return logits(partial(expert_reference.route, dtype=dtype), **arguments)

    def make(generator: torch.Generator) -> Inputs:
        return expert_cases.make_inputs(case, dtype, device, generator)

    run = partial(ops.decode_route, impl=impl)
    plain = PlainPyTorch(truth, dtype, operands=torch.float32)
    check(partial(logits, run), truth, make, dtype=dtype, plain=plain)
    inputs = make(torch.Generator().manual_seed(1))
    found = routed(run, **inputs.tensors, **inputs.options)
    exact = case.buffers(inputs.tensors["gate"].double())
    exact.logits.copy_(found.logits)
    router = case.router(*(inputs.tensors[name] for name in ("gain", "gate", "bias")))
    active = inputs.options["active"]
    expert_reference.choose(router, active, exact)
    assert torch.equal(found.experts, exact.experts)
    torch.testing.assert_close(found.weights[active], exact.weights[active].float())
    assert not found.counters.any()
    if impl == "triton" and case.rows > 1:
        expert_reference.order(exact)
        used, choices = int((exact.slots[0] >= 0).sum()), int((exact.experts >= 0).sum())
        assert torch.equal(found.slots[0], exact.slots[0])
        assert torch.equal(found.slots[:, :used], exact.slots[:, :used])
        assert torch.equal(found.choices[:choices], exact.choices[:choices])


def experts(
    run: Callable[..., Tensor],
    *,
    case: expert_cases.Case,
    active: Tensor,
    chosen: Tensor,
    **tensors: Any,
) -> Tensor:
    """The result for choices that were made; of a lone row that is not active it means nothing."""
    given = {k: t if t is None else t.detach() for k, t in tensors.items()}
    buffers = case.buffers(given["gate"])
    for name in ("normed", "weights"):
        getattr(buffers, name).copy_(given[name])
    buffers.experts.copy_(chosen)
    expert_reference.order(buffers)
    x = buffers.normed if given["latent"] is None else given["latent"]
    width = case.seen if case.routed else case.hidden
    out = given["gate"].new_full((case.rows, width), 7.0)
    if case.residual:
        out = given["stream"].clone()
    pairs = [
        None if up is None else (up, down)
        for up, down in (
            (given["up"], given["down"]),
            (given["shared_up"], given["shared_down"]),
        )
    ]
    residual = out if case.residual else None
    names = ("up", "down", "shared_up", "shared_down")
    updates = Updates(*(update(given[f"{name}_a"], given[f"{name}_b"]) for name in names))
    return run(x, *pairs, active, buffers, residual=residual, updates=updates, out=out)


def hold_experts(case: expert_cases.Case, dtype: torch.dtype, device: str, impl: str) -> Report:
    def truth(dtype: torch.dtype = torch.float64, **arguments: Any) -> Tensor:
        return experts(partial(expert_reference.experts, dtype=dtype), **arguments)

    return check(
        partial(experts, partial(ops.decode_experts, impl=impl)),
        truth,
        lambda generator: expert_cases.make_inputs(case, dtype, device, generator),
        dtype=dtype,
        plain=PlainPyTorch(truth, dtype, results=True),  # of linear layers
    )
