"""A decode step's experts: the rule, the router's choice, and what is refused."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_experts import cases
from tests.kernels.holding_products import experts, hold_experts, hold_route, routed

F32, F64 = torch.float32, torch.float64
NAMED = {case.name: case for case in cases.CASES}


def drawn(name: str, dtype: torch.dtype = F64) -> dict:
    inputs = cases.make_inputs(NAMED[name], dtype, "cpu", torch.Generator().manual_seed(0))
    return inputs.tensors | inputs.options


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_portable(case, dtype):
    hold_route(case, dtype, "cpu", "portable")
    hold_experts(case, dtype, "cpu", "portable")


@pytest.mark.parametrize("impl", ["portable", "reference"])
@pytest.mark.parametrize("name", ["groups", "forty-rows"])
def test_it_is_the_router_and_the_experts_of_a_layer(name, impl):
    case, inputs = NAMED[name], drawn(name)
    buffers = routed(lambda *args: ops.decode_route(*args, impl=impl), **inputs)
    x = ops.rms_norm(inputs["stream"], inputs["gain"], eps=1e-5, impl="portable")
    weights, chosen = ops.router(
        x,
        inputs["gate"],
        inputs["bias"],
        top_k=case.top_k,
        n_group=case.n_group,
        topk_group=case.topk_group,
        scaling_factor=2.5,
        impl="portable",
    )
    on = inputs["active"]
    torch.testing.assert_close(buffers.normed, x)
    torch.testing.assert_close(buffers.weights[on], weights[on])
    assert torch.equal(buffers.experts[on].long(), chosen[on])
    assert (buffers.experts[~on] == -1).all()


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_rows_that_are_not_active_stay(impl):
    inputs = drawn("idle-rows")
    run = lambda *args, **named: ops.decode_experts(*args, **named, impl=impl)  # noqa: E731
    before, idle = experts(run, **inputs), ~inputs["active"]
    for name in ("stream", "normed"):
        inputs[name][idle] = torch.nan
    after = experts(run, **inputs)
    assert torch.equal(before[~idle], after[~idle]) and after[idle].isnan().all()


@pytest.mark.parametrize(
    ("half", "changes", "message"),
    [
        ("route", {"stream": torch.ones(5, 63)}, r"stream \(5, 63\) .* for \(5, 64\)"),
        ("route", {"gate": torch.ones(15, 64)}, r"gate \(15, 64\).* \(16, 64\), \(16,\) and 3"),
        ("route", {"top_k": 2}, "and 2 choices: the buffers"),
        ("route", {"n_group": 3}, "3 groups of 16 experts"),
        ("route", {"topk_group": 5}, "5 of 4 groups"),
        ("route", {"active": torch.ones(5)}, "in torch.float32: bool or integers"),
        ("experts", {"routed": None, "shared": None}, "no experts: give"),
        ("experts", {"routed": (torch.ones(16, 32, 64),) * 2}, r"\(16, 64, 32\)"),
        ("experts", {"shared": (torch.ones(64, 64),) * 2}, "shared in torch.float32 and"),
        ("experts", {"x": torch.ones(5, 64)}, "x in torch.float32: torch.float64 is needed"),
        ("experts", {"x": torch.ones(5, 6)}, r"x \(5, 6\): contiguous \(5, 64\)"),
        ("experts", {"out": torch.ones(64, 5).T}, r"out \(5, 64\): contiguous"),
        ("experts", {"residual": torch.ones(4, 64)}, r"residual \(4, 64\): contiguous \(5, 64\)"),
        ("experts", {"active": torch.ones(4).int()}, r"active \(4,\)"),
    ],
)
def test_what_does_not_fit_is_refused(half, changes, message):
    case, inputs = NAMED["groups"], drawn("groups")
    buffers = case.buffers(inputs["gate"])
    given = inputs | changes
    router = case.router(given["gain"], given["gate"], given["bias"])
    router = router._replace(**{k: v for k, v in changes.items() if k in router._fields})
    stream, active = given["stream"], given["active"]
    with pytest.raises(ValueError, match=message):
        if half == "route":
            ops.decode_route(stream, router, active, buffers)
        else:
            pairs = {
                "routed": (inputs["up"], inputs["down"]),
                "shared": (inputs["shared_up"], inputs["shared_down"]),
            }
            arguments = {"x": buffers.normed, **pairs, "out": stream.clone()} | changes
            ops.decode_experts(**({"active": active} | arguments), buffers=buffers)


def test_latent_experts_and_a_shared_one_are_called_apart():
    case, inputs = NAMED["latent"], drawn("latent")
    buffers = case.buffers(inputs["gate"])
    pair = torch.ones(0, 64, dtype=F64), torch.ones(64, 0, dtype=F64)
    with pytest.raises(ValueError, match="routed experts of 40 inputs and a shared one of 64"):
        ops.decode_experts(
            inputs["latent"],
            (inputs["up"], inputs["down"]),
            pair,
            inputs["active"],
            buffers,
            out=inputs["latent"].clone(),
        )
