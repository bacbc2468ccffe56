"""Every portable form against its reference: outputs, states and all gradients, by the rule."""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import cases as attention_cases
from nemotron_v3.ops.attention.reference import attention as attention_reference
from nemotron_v3.ops.causal_conv1d import cases as conv_cases
from nemotron_v3.ops.causal_conv1d.reference import causal_conv1d as conv_reference
from nemotron_v3.ops.cross_entropy import cases as loss_cases
from nemotron_v3.ops.cross_entropy.reference import cross_entropy as loss_reference
from nemotron_v3.ops.cross_entropy.reference import shift_labels as shift_labels_reference
from nemotron_v3.ops.experts import cases as experts_cases
from nemotron_v3.ops.experts.reference import experts as experts_reference
from nemotron_v3.ops.gated_rms_norm import cases as gated_cases
from nemotron_v3.ops.gated_rms_norm.reference import gated_rms_norm as gated_reference
from nemotron_v3.ops.low_rank_linear import cases as low_rank_cases
from nemotron_v3.ops.low_rank_linear.reference import low_rank_linear as low_rank_reference
from nemotron_v3.ops.mamba2 import cases as mamba2_cases
from nemotron_v3.ops.mamba2.reference import mamba2 as mamba2_reference
from nemotron_v3.ops.rms_norm import cases as norm_cases
from nemotron_v3.ops.rms_norm.reference import rms_norm as norm_reference
from nemotron_v3.ops.router import cases as router_cases
from nemotron_v3.ops.router.reference import router as router_reference
from nemotron_v3.ops.ssd import cases as ssd_cases
from nemotron_v3.ops.ssd.reference import ssd as ssd_reference
from tests.accuracy import PlainPyTorch, check

DTYPES = (torch.float32, torch.bfloat16)
WIDE = "fp32 or wider"
SAME = "the inputs' dtype"
INDEX = "int64"


def cases(module: ModuleType) -> Callable:
    """The op's cases times the dtypes, with readable ids."""
    every = [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype).removeprefix('torch.')}")
        for case in module.CASES
        for dtype in DTYPES
    ]
    return pytest.mark.parametrize(("case", "dtype"), every)


def hold(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    module: ModuleType,
    case: Any,
    dtype: torch.dtype,
    outputs: dict[str, str],
    *,
    plain: dict[str, Any] | None = None,
    long_decay: bool = False,
    **plain_arguments: Any,
) -> None:
    """The op's portable form by the accuracy rule; each output in the dtype it is promised in.

    `plain` are options of `PlainPyTorch`, `plain_arguments` what it gives to the reference.
    """

    def named(results: Any) -> dict[str, Tensor]:
        results = results if isinstance(results, tuple) else (results,)
        return dict(zip(outputs, results, strict=True))

    def function(**arguments: Any) -> dict[str, Tensor]:
        results = named(op(**arguments, impl="portable"))
        kinds = {SAME: dtype, WIDE: torch.promote_types(dtype, torch.float32), INDEX: torch.int64}
        expected = {name: kinds[promise] for name, promise in outputs.items()}
        assert {name: result.dtype for name, result in results.items()} == expected
        return results

    def truth(**arguments: Any) -> dict[str, Tensor]:
        return named(reference(**arguments))

    def make_inputs(generator: torch.Generator) -> Any:
        return module.make_inputs(case, dtype, "cpu", generator)

    check(
        function,
        truth,
        make_inputs,
        dtype=dtype,
        plain=PlainPyTorch(partial(truth, **plain_arguments), dtype, **(plain or {})),
        long_decay=long_decay,
    )


@cases(norm_cases)
def test_rms_norm(case, dtype):
    hold(ops.rms_norm, norm_reference, norm_cases, case, dtype, {"y": SAME})


@cases(gated_cases)
def test_gated_rms_norm(case, dtype):
    hold(ops.gated_rms_norm, gated_reference, gated_cases, case, dtype, {"y": SAME})


@cases(conv_cases)
def test_causal_conv1d(case, dtype):
    outputs = {"y": SAME, "final_states": SAME}
    hold(ops.causal_conv1d, conv_reference, conv_cases, case, dtype, outputs)


@cases(ssd_cases)
def test_ssd(case, dtype):
    outputs = {"y": SAME, "final_states": WIDE}
    long_decay = case.decay in ("long", "mixed")
    hold(ops.ssd, ssd_reference, ssd_cases, case, dtype, outputs, long_decay=long_decay)


@cases(mamba2_cases)
def test_mamba2(case, dtype):
    """Plain PyTorch hands tensors from part to part in the model's dtype."""
    hold(
        ops.mamba2,
        mamba2_reference,
        mamba2_cases,
        case,
        dtype,
        {"y": SAME, "conv_states": SAME, "ssm_states": WIDE},
        long_decay=case.decay == "long",
        activation_dtype=dtype,
    )


@cases(attention_cases)
def test_attention(case, dtype):
    hold(ops.attention, attention_reference, attention_cases, case, dtype, {"y": SAME})


@cases(router_cases)
def test_router(case, dtype):
    """Its products are fp32 by contract; the chosen are a set, compared in the experts' order."""

    def by_expert(router: Callable[..., Any]) -> Callable[..., Any]:
        def ordered(**arguments: Any) -> tuple[Tensor, Tensor]:
            weights, indices = router(**arguments)
            indices, order = indices.sort(dim=1)
            return weights.gather(1, order), indices

        return ordered

    hold(
        by_expert(ops.router),
        by_expert(router_reference),
        router_cases,
        case,
        dtype,
        {"weights": WIDE, "indices": INDEX},
        plain={"operands": torch.float32},
    )


@cases(experts_cases)
def test_experts(case, dtype):
    """An expert is two linear layers, which return the model's dtype."""
    outputs = {"y": SAME}
    plain = {"results": True}
    hold(ops.experts, experts_reference, experts_cases, case, dtype, outputs, plain=plain)


@cases(low_rank_cases)
def test_low_rank_linear(case, dtype):
    outputs, plain = {"y": SAME}, {"results": True}
    module = low_rank_cases
    hold(ops.low_rank_linear, low_rank_reference, module, case, dtype, outputs, plain=plain)


@cases(loss_cases)
def test_cross_entropy(case, dtype):
    hold(ops.cross_entropy, loss_reference, loss_cases, case, dtype, {"loss": WIDE})


@pytest.mark.parametrize(
    "layout",
    [
        SequenceLayout.from_lengths((1, 0, 5, 1, 2)),
        SequenceLayout.plain(3, 4),
        SequenceLayout.from_padding_mask(torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 0]])),
    ],
    ids=["packed", "batch", "padded"],
)
def test_shift_labels(layout):
    labels = torch.arange(100, 100 + torch.Size(layout.shape).numel()).reshape(layout.shape)
    assert torch.equal(ops.shift_labels(labels, layout), shift_labels_reference(labels, layout))
