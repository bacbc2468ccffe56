"""The report says what runs: compared with what is seen running."""

import pytest
import torch
from torch import nn

from nemotron_v3 import BackendConfig, report
from nemotron_v3.layers import NemotronV3Attention
from nemotron_v3.ops.registry import Op
from tests.models import ALL_BLOCKS, tiny_config, tiny_model, tokens


def run(model: nn.Module) -> None:
    """A forward pass with a loss, then two with a cache: several tokens, and one."""
    with torch.no_grad():
        model(tokens(1, 5), labels=tokens(1, 5))
        cache = model(tokens(1, 5), use_cache=True).past_key_values
        model(tokens(1, 1), past_key_values=cache)


def seen_running(model: nn.Module, monkeypatch) -> set[tuple[str, str]]:
    """(op, form) of every choice that running makes."""
    seen = set()
    pick = Op.pick

    def recorded(op, *args):
        function = pick(op, *args)
        forms = {op.reference: "reference", op.portable: "portable"}
        forms |= {special: name for name, special in op.special.items()}
        seen.add((op.name, forms[getattr(function, "function", function)]))
        return function

    with monkeypatch.context() as patch:
        patch.setattr(Op, "pick", recorded)
        run(model)
    return seen


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "backend",
    [
        BackendConfig(),
        BackendConfig(impl="reference"),
        BackendConfig(impl="reference", rms_norm="torch", attn="flex"),
    ],
    ids=["default", "reference", "mixed"],
)
def test_what_it_says_is_what_runs(backend, monkeypatch):
    model = tiny_model(backend=backend).double()  # the dtype of the reference forms
    run(model)  # self-checks make choices of their own
    no_ops = ("projections", "generation")
    reported = {(r.computes, r.uses) for r in report(model).rows if r.computes not in no_ops}
    running = seen_running(model, monkeypatch)
    # The parts of a mixer are chosen by the mixer's form.
    parts = {"causal_conv1d", "ssd", "gated_rms_norm", "ssm_step"}
    assert reported == {(op, form) for op, form in running if op not in parts}


def test_rows_name_every_layer_and_the_reason():
    rows = report(tiny_model(backend=BackendConfig(rms_norm="torch"))).rows
    norms = [r for r in rows if r.computes == "rms_norm"]
    assert [r.layer for r in norms] == [f"model.layers.{i}.norm" for i in range(7)] + [
        "model.norm_f"
    ]
    assert {(r.uses, r.why) for r in norms} == {("portable", "rms_norm='torch'")}
    assert [r.layer for r in rows if r.computes == "mamba2"] == [
        f"model.layers.{i}.mixer" for i, letter in enumerate(ALL_BLOCKS) if letter == "M"
    ]


def test_a_replaced_projection_is_seen():
    class Adapter(nn.Linear):
        pass

    layer = NemotronV3Attention(tiny_config())
    before = [r.uses for r in report(layer).rows if r.computes == "projections"]
    layer.o_proj = Adapter(80, 48)
    after = [r.uses for r in report(layer).rows if r.computes == "projections"]
    assert before == ["torch Linear"]
    assert after != before and "Adapter" in after[0]


def test_equal_rows_are_one_line_of_text():
    text = str(report(tiny_model()))
    line = next(line for line in text.splitlines() if line.startswith("mamba2"))
    assert line.endswith("model.layers.{0,4}.mixer")
    assert len(text.splitlines()) < 13


def test_it_says_why_generation_is_no_graph():
    (row,) = [r for r in report(tiny_model()).rows if r.computes == "generation"]
    assert (row.layer, row.uses) == ("", "no CUDA graph")
    assert row.why == "the model is on cpu, and a CUDA graph needs an NVIDIA GPU"


def test_a_foreign_module_is_refused():
    with pytest.raises(ValueError, match="a Linear holds no layer"):
        report(nn.Linear(2, 2))
