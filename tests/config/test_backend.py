from types import SimpleNamespace

import pytest

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


def test_fake_routing_is_not_ignored():
    with pytest.raises(ValueError, match="fake_balanced_gate"):
        BackendConfig.from_any(SimpleNamespace(fake_balanced_gate=True))
    assert BackendConfig.from_any(SimpleNamespace(fake_balanced_gate=False)) == BackendConfig()
