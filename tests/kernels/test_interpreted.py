"""Each Triton form by the accuracy rule in Triton's interpreter, on a short list of shapes.

The long list and speed are for a GPU (tests/gpu).
"""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron_v3 import BackendConfig, NemotronV3Config, ops
from nemotron_v3.layers import NemotronV3Mamba2Mixer
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.attention import cases as attention_cases
from nemotron_v3.ops.causal_conv1d import cases as conv_cases
from nemotron_v3.ops.gated_rms_norm import cases as gated_cases
from nemotron_v3.ops.mamba2 import cases as mamba2_cases
from nemotron_v3.ops.rms_norm import cases as norm_cases
from nemotron_v3.ops.ssd import cases as ssd_cases
from tests.kernels.holding import hold, results
from tests.kernels.interpreter import mend_bfloat16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
STRONG = ssd_cases.Case("strong", (70,), 8, 8, 1, 16, decay="strong")
PACK = ssd_cases.Case("tiles", (1, 0, 70), 64, 8, 64, 8, initial_states=True)
DOCUMENTS = attention_cases.Case("documents", (1, 0, 5, 40, 3), 6, 2, 16, strided=True)
SHARED = attention_cases.Case("shared", (33, 2), 5, 1, 24, scale=0.5)
MIXER = mamba2_cases.Case("pack", (1, 0, 6), 64, 8, 64, 8, width=3, states=True)


@pytest.mark.parametrize(
    ("op", "case", "dtype"),
    [
        ("rms_norm", norm_cases.Case("odd-width", 3, 67), F32),
        ("rms_norm", norm_cases.Case("odd-width", 3, 67), F16),
        ("gated_rms_norm", gated_cases.Case("strided", 9, 3, 80, strided=True), F32),
        ("gated_rms_norm", gated_cases.Case("no-gate", 9, 3, 80, gate=False), F16),
        (
            "causal_conv1d",
            conv_cases.Case("pack", (1, 0, 4, 5), 70, 4, initial_states=True, strided=True),
            F32,
        ),
        ("causal_conv1d", conv_cases.Case("wide", (9, 2), 70, 8, activation=None), F16),
        # Minutes of a processor: many heads, because a tensor's error is pooled over 64 elements.
        pytest.param("ssd", PACK, F32, marks=pytest.mark.heavy),
        pytest.param("ssd", STRONG, F32, marks=pytest.mark.heavy),
        pytest.param("ssd", STRONG, BF16, marks=pytest.mark.heavy),
        ("ssd", ssd_cases.Case("one-token", (1,), 3, 64, 1, 16, initial_states=True), BF16),
        pytest.param("mamba2", MIXER, F16, marks=pytest.mark.heavy),
        ("attention", DOCUMENTS, F32),
        ("attention", DOCUMENTS, BF16),
        ("attention", SHARED, F16),
        ("attention", attention_cases.Case("one-token", (1,), 3, 1, 64), F32),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "name", str(value)[6:]),
)
def test_accuracy(op, case, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold(op, case, dtype, "cpu")


def test_a_compiled_mixer_takes_every_length():
    """One graph for the first length, one for all others (of more than one chunk)."""
    torch._dynamo.reset()
    config = NemotronV3Config(
        layers_block_type="M",
        hidden_size=32,
        mamba_num_heads=2,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
    )
    mixer = NemotronV3Mamba2Mixer(config, 0)
    mixer.backend = BackendConfig(impl="triton")
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mixer, backend=counted, fullgraph=True)
    for length in (70, 80, 90):
        x = torch.randn(1, length, 32)
        with torch.no_grad():
            assert torch.equal(compiled(x), mixer(x))
    assert counted.frame_count == 2


@pytest.mark.heavy
def test_compiled_graph_equals_eager():
    """`torch.compile(fullgraph=True)` sees the op as a node, forward and backward."""
    case = mamba2_cases.Case("plain", (5, 3), 2, 16, 1, 16)
    inputs = mamba2_cases.make_inputs(case, F32, "cpu", torch.Generator().manual_seed(0))
    leaves = {k: None if t is None else t.requires_grad_() for k, t in inputs.tensors.items()}
    given = [t for t in leaves.values() if t is not None]

    def core(**tensors):
        return ops.mamba2(**tensors, **inputs.options, impl="triton")[0]

    y, compiled = core(**leaves), torch.compile(core, backend="aot_eager", fullgraph=True)
    y_compiled = compiled(**leaves)
    assert torch.equal(y, y_compiled)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, given, dy)
    for a, b in zip(expected, torch.autograd.grad(y_compiled, given, dy), strict=True):
        assert torch.equal(a, b)


def test_a_document_does_not_feel_its_neighbours():
    """Bit by bit: packed beside another document, or alone."""
    case = mamba2_cases.Case("pack", (3, 5), 2, 16, 1, 16)
    inputs = mamba2_cases.make_inputs(case, F32, "cpu", torch.Generator().manual_seed(0))
    both = results("mamba2", inputs)
    inputs.tensors["zxbcdt"] = inputs.tensors["zxbcdt"][3:]
    inputs.options["layout"] = SequenceLayout.from_lengths([5])
    alone = results("mamba2", inputs)
    assert torch.equal(both[0][3:], alone[0])


def test_what_kernels_cannot_do_is_refused():
    x, weight = torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="computes in fp32, and torch.float64"):
        ops.rms_norm(x, weight, impl="triton")
    layout = SequenceLayout.from_lengths([2])
    with pytest.raises(RuntimeError, match="2 to 8 taps, and 9"):
        ops.causal_conv1d(torch.ones(2, 4), torch.ones(4, 9), None, layout=layout, impl="triton")


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_dispatch_mode_sees_the_op_that_plain_calls_skip():
    """Selective checkpointing and fake tensors go by the op's name; results are the same."""
    y, z, weight = torch.randn(3, 32), torch.randn(3, 32), torch.randn(32, requires_grad=True)

    def run():
        out = ops.gated_rms_norm(y, z, weight, 16, impl="triton")
        return out, torch.autograd.grad(out.sum(), weight)[0]

    plain = run()
    with Watch() as watch:
        watched = run()
    assert "nemotron_v3.gated_rms_norm.default" in watch.seen
    assert "nemotron_v3.gated_rms_norm_backward.default" in watch.seen
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


@pytest.mark.parametrize("watched", [False, True])
def test_second_derivatives_and_tangents_are_refused(watched):
    y, z, weight = (torch.randn(n, 32, requires_grad=True) for n in (3, 3, 1))
    with Watch() if watched else nullcontext():
        out = ops.gated_rms_norm(y, z, weight[0], 16, impl="triton")
        (first,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            first.sum().backward()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="no forward-mode"):
        dual = forward_ad.make_dual(y.detach(), torch.ones_like(y))
        ops.gated_rms_norm(dual, z.detach(), weight[0].detach(), 16, impl="triton")


def test_large_products_in_fp16():
    """C . B is 78 000 where y is 16 000."""
    case = ssd_cases.Case("large", (20, 3), 1, 16, 1, 64)
    inputs = ssd_cases.make_inputs(case, F16, "cpu", torch.Generator().manual_seed(0))
    inputs.tensors |= {n: torch.full_like(inputs.tensors[n], 35.0) for n in ("B", "C")}
    assert all(torch.isfinite(y).all() for y in results("ssd", inputs)[:2])
