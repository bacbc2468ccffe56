from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from nemotron_v3.config import BackendConfig


def test_defaults():
    default = BackendConfig(attn="sdpa", linear="torch", rms_norm="auto", impl="auto")
    assert BackendConfig() == default
    assert BackendConfig.from_any(None) == default
    assert BackendConfig.from_any(default) is default


def test_a_foreign_one_with_more_fields_is_read():
    foreign = SimpleNamespace(
        attn="flex", linear="torch", rms_norm="torch_fp32", experts="gmm", dispatcher="deepep"
    )
    assert BackendConfig.from_any(foreign) == BackendConfig(attn="flex", rms_norm="torch")
    assert vars(foreign)["rms_norm"] == "torch_fp32"
    assert BackendConfig.from_any({"impl": "portable"}) == BackendConfig(impl="portable")


@pytest.mark.parametrize(
    ("field", "value"),
    [("attn", "fa3"), ("linear", "fp8"), ("rms_norm", "apex"), ("impl", "cuda"), ("impl", None)],
)
def test_values_we_do_not_have_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value!r}, which is not offered: use "):
        BackendConfig(**{field: value})


def test_fake_routing_is_read_and_its_noise_refused():
    assert BackendConfig.from_any(SimpleNamespace(fake_balanced_gate=True)).fake_balanced_gate
    assert BackendConfig.from_any(SimpleNamespace(fake_balanced_gate=False)) == BackendConfig()
    with pytest.raises(ValueError, match="fake_gate_noise is 0.1"):
        BackendConfig.from_any(SimpleNamespace(fake_gate_noise=0.1))


def test_a_part_reads_its_own_fields_alone():
    foreign = SimpleNamespace(attn="eager", rms_norm="torch", fake_balanced_gate=True)
    assert BackendConfig.from_any(foreign, "mlp") == BackendConfig()
    assert BackendConfig.from_any(foreign, "moe") == BackendConfig(fake_balanced_gate=True)
    assert BackendConfig.from_any(foreign, "block") == BackendConfig(rms_norm="torch")
    with pytest.raises(ValueError, match="attn is 'eager'"):
        BackendConfig.from_any(foreign, "attention")


@dataclass
class Released:
    attn: str = "sdpa"
    experts: str = "torch_mm"
    gate_precision: torch.dtype | None = None
    from_later: bool = False


def test_a_field_that_nothing_reads_is_refused_once_it_is_used():
    assert BackendConfig.from_any(Released(experts="gmm")) == BackendConfig()
    with pytest.raises(ValueError, match="backend.from_later is True, and nothing here reads it"):
        BackendConfig.from_any(Released(from_later=True))
    with pytest.raises(ValueError, match="backend.ipml is 'portable'.*did you mean impl"):
        BackendConfig.from_any({"ipml": "portable"})
