"""A dtype by its name, wherever weights are loaded, saved or converted."""

import pytest
import torch

from nemotron_v3.checkpoint import convert, from_pretrained, plan_conversion, save_pretrained
from nemotron_v3.checkpoint.reader import open_checkpoint
from tests.models import tiny_model

NAMES = ["bfloat16", "float16", "float32", "float64"]
EMBEDDINGS = "backbone.embeddings.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("dtypes")
    save_pretrained(tiny_model(), path)
    return path


@pytest.mark.parametrize("prefix", ["", "torch."])
@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_is_the_dtype(checkpoint, tmp_path, name, prefix):
    dtype, told = getattr(torch, name), prefix + name
    model, expected = from_pretrained(checkpoint, dtype=told), from_pretrained(checkpoint, dtype)
    state = model.state_dict()
    for key, tensor in expected.state_dict().items():
        assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor)
    assert model.model.embeddings.weight.dtype == dtype
    save_pretrained(from_pretrained(checkpoint), tmp_path / "saved", dtype=told)
    convert(checkpoint, tmp_path / "converted", dtype=told)
    for folder in ("saved", "converted"):
        assert open_checkpoint(tmp_path / folder).dtype(EMBEDDINGS) == dtype


def test_auto_leaves_the_choice_here(checkpoint, tmp_path):
    save_pretrained(from_pretrained(checkpoint), tmp_path / "half", dtype="float16")
    assert from_pretrained(tmp_path / "half", "auto").model.embeddings.weight.dtype == torch.float16
    model = from_pretrained(tmp_path / "half", "float32")
    save_pretrained(model, tmp_path / "saved", dtype="auto")
    convert(tmp_path / "half", tmp_path / "converted", dtype="auto")
    for folder in ("saved", "converted"):
        assert open_checkpoint(tmp_path / folder).dtype(EMBEDDINGS) == torch.float16


@pytest.mark.parametrize("value", ["int8", "bfloat61", "", "torch.", torch.int8, 32])
def test_any_other_is_refused_by_its_name(checkpoint, tmp_path, value):
    told = repr(value) if isinstance(value, str) else str(value)
    model = from_pretrained(checkpoint)
    calls = {
        "loaded": [lambda: from_pretrained(checkpoint, dtype=value)],
        "saved": [
            lambda: save_pretrained(model, tmp_path / "saved", dtype=value),
            lambda: convert(checkpoint, tmp_path / "converted", dtype=value),
            lambda: plan_conversion(checkpoint, tmp_path / "converted", dtype=value),
        ],
    }
    for done, each in calls.items():
        for call in each:
            with pytest.raises(ValueError) as error:
                call()
            assert f"no model is {done} in dtype {told}: give bfloat16" in str(error.value)
    assert not list(tmp_path.iterdir())
