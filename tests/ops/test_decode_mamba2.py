"""The step of a Mamba-2 mixer on fixed buffers: the rule, and what it shares with `mamba2_step`."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_mamba2 import cases
from nemotron_v3.ops.decode_mamba2.ring import conv_of, ring_of
from tests.accuracy import relative_error
from tests.kernels.holding_decode import hold, results

F64 = torch.float64
SIZES = cases.Case("sizes", (3, 6, 0), 4, 8, 2, 16)


def drawn(case: cases.Case = SIZES, dtype: torch.dtype = F64):
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_portable(case, dtype):
    hold("decode_mamba2", case, dtype, "cpu", "portable")


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_it_is_the_step_of_a_cache_without_the_norm(impl):
    """Five tokens of slots that began at different times, beside `mamba2_step` on `[R, C, W]`."""
    inputs = drawn()
    tensors, options = inputs.tensors, inputs.options
    projected, ring, ssm = (tensors.pop(name) for name in ("projected", "conv", "ssm"))
    positions, inner = options["positions"], SIZES.inner
    conv, ssm_of_cache = conv_of(ring, positions).contiguous(), ssm.clone()
    norm_weight = torch.ones(inner, dtype=F64)
    for step in range(5):
        x = projected.roll(step, 1)
        y = ops.decode_mamba2(x, ring, ssm, **tensors, **options, impl=impl)
        normed = ops.mamba2_step(
            x,
            **tensors,
            norm_weight=norm_weight,
            conv_state=conv,
            ssm_state=ssm_of_cache,
            n_groups=SIZES.groups,
            head_dim=SIZES.head_dim,
            state_size=SIZES.state,
            impl="portable",
        )
        positions += 1
        ours = ops.gated_rms_norm(y, None, norm_weight, inner // SIZES.groups, impl="portable")
        assert relative_error(ours, normed) < 1e-12
    assert torch.equal(conv_of(ring, positions), conv)
    assert relative_error(ssm, ssm_of_cache) < 1e-12


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_slots_that_are_not_active_keep_every_bit(impl):
    """Also where they hold, and are given, what is not a number; their result is 0."""
    inputs = drawn(cases.Case("idle", (-2, 3, -9), 4, 8, 2, 16))
    before = results("decode_mamba2", inputs, impl)
    for name in ("projected", "conv", "ssm"):
        inputs.tensors[name][::2] = torch.nan
    after = results("decode_mamba2", inputs, impl)
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert torch.equal(after["out"][::2], torch.zeros_like(after["out"][::2]))
    assert after["conv"][::2].isnan().all() and after["ssm"][::2].isnan().all()


def test_one_input_enters_the_ring_and_the_others_stay():
    inputs = drawn()
    after = results("decode_mamba2", inputs, "portable")["conv"]
    inner, channels = SIZES.inner, SIZES.conv_dim
    expected = inputs.tensors["conv"].clone()
    for row, held in enumerate(SIZES.held):
        expected[row, held % 4] = inputs.tensors["projected"][row, inner : inner + channels]
    assert torch.equal(after, expected)


def test_a_ring_and_a_conv_state_hold_the_same_inputs():
    positions = torch.tensor([0, 1, 2, 3, 4, 5, 1003])
    conv = torch.randn(7, 5, 4)
    ring = ring_of(conv, positions)
    for row, held in enumerate(positions.tolist()):
        for back in range(1, 5):  # the input of position held - back
            assert torch.equal(ring[row, (held - back) % 4], conv[row, :, -back])
    assert ring.is_contiguous() and torch.equal(conv_of(ring, positions), conv)


def test_a_narrow_state_is_rounded_once():
    inputs = drawn(dtype=torch.float32)
    wide = results("decode_mamba2", inputs, "portable")
    narrow = inputs.tensors["ssm"].bfloat16()
    inputs.tensors["ssm"] = narrow.float()
    exact = results("decode_mamba2", inputs, "portable")
    inputs.tensors["ssm"] = narrow
    rounded = results("decode_mamba2", inputs, "portable")
    assert torch.equal(rounded["ssm"], exact["ssm"].bfloat16())
    assert torch.equal(rounded["out"], exact["out"]) and not torch.equal(wide["out"], exact["out"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_groups": 3}, "n_groups 3 does not divide the 4 heads"),
        ({"projected": torch.ones(3, 5)}, r"projected \(3, 5\) and conv"),
        ({"conv": torch.ones(3, 4, 7)}, r"conv \(3, 4, 7\) do not fit"),
        ({"positions": torch.zeros(3, dtype=torch.int32)}, "in torch.int32: int64"),
        ({"active": torch.ones(3)}, "in torch.float32: bool or integers"),
        ({"active": torch.ones(2, dtype=torch.bool)}, r"active \(2,\)"),
        ({"conv_weight": torch.ones(96, 3)}, r"conv_weight \(96, 3\) must be \(96, 4\)"),
        ({"conv_bias": torch.ones(3)}, r"conv_bias \(3,\) must be \(96,\)"),
        ({"D": torch.ones(3)}, r"D \(3,\) must be \(4,\)"),
        ({"out": torch.ones(3, 32)}, "contiguous .* in torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    inputs = drawn()
    with pytest.raises(ValueError, match=message):
        ops.decode_mamba2(**(inputs.tensors | inputs.options | changes))


def test_states_that_are_not_contiguous_are_refused():
    inputs = drawn()
    inputs.tensors["conv"] = inputs.tensors["conv"].transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.decode_mamba2(**inputs.tensors, **inputs.options)
