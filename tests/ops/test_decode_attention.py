"""Attention of one token a slot on fixed buffers: the rule, and `cached_attention` beside it."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.decode_attention import cases
from nemotron_v3.ops.decode_attention.split import parts_of, split_of, workspace_size
from tests.accuracy import relative_error
from tests.kernels.holding_decode import hold, results

F64 = torch.float64
SIZES = cases.Case("sizes", (3, 0, 17, 6), 24, 4, 2, 16)


def drawn(case: cases.Case = SIZES, dtype: torch.dtype = F64):
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_portable(case, dtype):
    hold("decode_attention", case, dtype, "cpu", "portable")


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_it_is_attention_to_a_cache(impl):
    """Five tokens of slots of different lengths."""
    inputs = drawn()
    qkv, keys, values = inputs.tensors.values()
    H, J, P = SIZES.heads, SIZES.kv_heads, SIZES.head_dim
    theirs, rows = [keys.clone(), values.clone()], torch.arange(len(SIZES.held))
    positions = inputs.options["positions"]
    for step in range(5):
        x = qkv.roll(step, 1)
        y = ops.decode_attention(x, keys, values, **inputs.options, impl=impl)
        q, *new = x.view(len(x), -1, P).split([H, J, J], dim=1)
        for buffer, t in zip(theirs, new, strict=True):
            buffer[rows, :, positions] = t
        expected = ops.cached_attention(
            q,
            *theirs,
            layout=SequenceLayout.plain(len(x), 1),
            starts=tuple(positions.tolist()),
            positions=positions,
            impl="reference",
        )
        assert relative_error(y, expected.flatten(1)) < 1e-12
        assert torch.equal(keys, theirs[0]) and torch.equal(values, theirs[1])
        positions += 1


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_slots_that_are_not_active_keep_every_bit(impl):
    inputs = drawn(cases.Case("idle", (-2, 3, -9), 12, 4, 2, 16))
    before = results("decode_attention", inputs, impl)
    for name in ("qkv", "keys", "values"):
        inputs.tensors[name][::2] = torch.nan
    after = results("decode_attention", inputs, impl)
    assert all(torch.equal(before[name][1], after[name][1]) for name in before)
    assert torch.equal(after["out"][::2], torch.zeros_like(after["out"][::2]))
    assert after["keys"][::2].isnan().all() and after["values"][::2].isnan().all()


@pytest.mark.parametrize("impl", ["portable", "reference"])
def test_a_slot_without_a_place_gives_no_number_and_writes_nothing(impl):
    inputs = drawn(cases.Case("full", (3, 8, 2), 8, 4, 2, 16))
    inputs.options["positions"][2] = -1
    after = results("decode_attention", inputs, impl)
    assert after["out"][1:].isnan().all() and after["out"][0].isfinite().all()
    assert all(torch.equal(after[n][1:], inputs.tensors[n][1:]) for n in ("keys", "values"))


def test_places_are_split_by_the_capacity_alone():
    assert [split_of(n) for n in (1, 128, 16384, 16385, 131072, 1 << 20)] == [
        *(128, 128, 128, 256, 1024, 8192)
    ]
    assert [parts_of(n) for n in (1, 128, 129, 131072)] == [1, 1, 2, 128]
    assert workspace_size(3, 32, 128, 300) == 3 * 32 * 3 * 129


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "3 heads, places, head width"),
        ({"num_heads": 5}, "of 5 query heads does not fit"),
        ({"qkv": torch.ones(4, 5)}, r"qkv \(4, 5\)"),
        ({"values": torch.ones(4, 2, 23, 16)}, r"values \(4, 2, 23, 16\)"),
        ({"positions": torch.zeros(4, dtype=torch.int32)}, "in torch.int32: int64"),
        ({"active": torch.ones(4)}, "in torch.float32: bool or integers"),
        ({"workspace": torch.ones(271)}, "272 contiguous elements"),
        ({"workspace": torch.ones(999, dtype=F64)}, "272 contiguous elements in torch.float32"),
        ({"out": torch.ones(4, 64)}, "contiguous .* in torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    inputs = drawn()
    with pytest.raises(ValueError, match=message):
        ops.decode_attention(**(inputs.tensors | inputs.options | changes))


def test_buffers_that_are_not_contiguous_are_refused():
    inputs = drawn()
    inputs.tensors["keys"] = inputs.tensors["keys"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="must be contiguous"):
        ops.decode_attention(**inputs.tensors, **inputs.options)
