"""The kernels of decode_attention in Triton's interpreter: the rule, parts, slots, memory."""

import pytest
import torch

from nemotron_v3 import ops
from nemotron_v3.ops.decode_attention import cases
from nemotron_v3.ops.decode_attention.split import workspace_size
from tests.kernels.holding_decode import hold, results
from tests.kernels.interpreter import mend_bfloat16

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs them compiled")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMED = {case.name: case for case in cases.CASES}


def drawn(case: cases.Case, dtype: torch.dtype = F32):
    return cases.make_inputs(case, dtype, "cpu", torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("first-token", BF16),
        ("one-part", F32),
        ("borders", F32),
        ("borders", BF16),
        ("idle", BF16),
        ("no-groups", F16),
        ("many-queries", F32),
        ("none-active", F32),
    ],
)
def test_accuracy(name, dtype, monkeypatch):
    mend_bfloat16(monkeypatch)
    hold("decode_attention", NAMED[name], dtype, "cpu", "triton")


def test_a_result_depends_on_its_slot_and_the_split_alone():
    """Bit by bit: among others or alone, in a larger buffer, over a used workspace."""
    inputs = drawn(NAMED["borders"])
    together = results("decode_attention", inputs, "triton")
    alone = {name: t[1:2] for name, t in inputs.tensors.items()}
    alone |= {name: inputs.options[name][1:2] for name in ("positions", "active")}
    room = (0, 0, 0, 300)
    alone |= {name: torch.nn.functional.pad(alone[name], room) for name in ("keys", "values")}
    workspace = torch.full((workspace_size(1, 4, 16, 556),), torch.nan)
    out = torch.full((1, 64), torch.nan)
    found = results("decode_attention", inputs, "triton", **alone, workspace=workspace, out=out)
    assert torch.equal(found["out"], together["out"][1:2])
    assert torch.equal(found["keys"][:, :, :256], together["keys"][1:2])
    assert not found["keys"][:, :, 256:].any()


def test_what_stands_behind_a_slots_tokens_is_not_read():
    inputs = drawn(NAMED["borders"])
    before = results("decode_attention", inputs, "triton")
    for row, held in enumerate(NAMED["borders"].held):
        for name in ("keys", "values"):
            inputs.tensors[name][row, :, held:] = torch.nan
    after = results("decode_attention", inputs, "triton")
    assert torch.equal(before["out"], after["out"])


@pytest.mark.parametrize("places", [128, 384], ids=["one-part", "parts"])
def test_idle_and_full_slots(places):
    """An idle slot keeps every bit; one without a place gives no number and writes nothing."""
    inputs = drawn(cases.Case("slots", (5, -7, places, 100), places, 4, 2, 16))
    inputs.options["active"] = inputs.options["active"].int() * 3
    before = results("decode_attention", inputs, "triton")
    for tensor in inputs.tensors.values():
        tensor[1:3] = torch.nan
    after = results("decode_attention", inputs, "triton")
    for row in (0, 3):
        assert all(torch.equal(before[name][row], after[name][row]) for name in before)
    assert not after["out"][1].any() and after["out"][2].isnan().all()
    assert before["out"][2].isnan().all()
    assert all(after[name][1:3].isnan().all() for name in ("keys", "values"))
    assert all(torch.equal(before[n][2], drawn_again(places, n)) for n in ("keys", "values"))


def drawn_again(places: int, name: str) -> torch.Tensor:
    return drawn(cases.Case("slots", (5, -7, places, 100), places, 4, 2, 16)).tensors[name][2]


def test_what_is_not_a_number_is_seen():
    for place in (0, 5, 130):
        inputs = drawn(cases.Case("one", (200,), 256, 2, 1, 16))
        inputs.tensors["values"][0, 0, place, 3] = torch.nan
        assert results("decode_attention", inputs, "triton")["out"].isnan().sum() == 2


def test_what_kernels_cannot_do_is_refused():
    inputs = drawn(NAMED["first-token"])
    with pytest.raises(RuntimeError, match="dtypes torch.bfloat16, torch.float32"):
        given = inputs.tensors | {"qkv": inputs.tensors["qkv"].bfloat16()}
        ops.decode_attention(**given, **inputs.options, impl="triton")
    with pytest.raises(RuntimeError, match="scale of the scores is -1"):
        given = inputs.options | {"scale": -1.0}
        ops.decode_attention(**inputs.tensors, **given, impl="triton")
