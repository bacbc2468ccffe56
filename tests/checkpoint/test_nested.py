"""Text models inside others: found by their prefix, the rest named; wrappers named."""

import json

import pytest
import torch

from nemotron_v3.checkpoint import (
    CheckpointError,
    audit,
    convert,
    from_pretrained,
    open_checkpoint,
    save_pretrained,
)
from nemotron_v3.checkpoint.plan import tensors_of
from tests.checkpoint.files import (
    assert_same,
    read_checkpoint,
    released_tensors,
    renamed,
    write_checkpoint,
)
from tests.checkpoint.narrow_files import CONFIG, narrow_tensors, wide_tensors
from tests.models import tokens

OTHERS = {"vision_model.patch.weight": torch.ones(3, 4), "mlp1.0.weight": torch.ones(2)}


def nested(directory, tensors, config: dict, **options):
    data = {"model_type": "nemotron_h_omni", "llm_config": CONFIG.to_dict(), **config}
    inside = renamed(tensors, lambda name: f"language_model.{name}")
    return write_checkpoint(directory, inside | OTHERS, data, **options)


def test_the_text_model_of_several_modes_is_loaded_and_the_rest_is_named(tmp_path):
    tensors = released_tensors(CONFIG)
    nested(tmp_path / "made", tensors, {}, shards=2)
    model = from_pretrained(tmp_path / "made")
    alone = from_pretrained(write_checkpoint(tmp_path / "alone", tensors, CONFIG))
    assert_same(tensors_of(model), tensors_of(alone))
    assert set(model.checkpoint_origin.report.beside) == set(OTHERS)
    audit(model, tmp_path / "made")
    save_pretrained(model, tmp_path / "saved")
    assert_same(read_checkpoint(tmp_path / "saved"), tensors)
    convert(tmp_path / "made", tmp_path / "text")
    assert_same(read_checkpoint(tmp_path / "text"), tensors)
    assert json.loads((tmp_path / "text/config.json").read_text())["model_type"] == "nemotron_h"
    audit(from_pretrained(tmp_path / "text"), tmp_path / "made")


def test_a_narrow_one_is_told_by_the_names_of_the_whole(tmp_path):
    tensors, weights = narrow_tensors()
    quantised = {"quant_method": "modelopt", "ignore": ["vision_model*", "lm_head"]}
    directory = nested(tmp_path / "made", tensors, {"quantization_config": quantised})
    convert(directory, tmp_path / "wide", dequantise=True)
    wide = wide_tensors(tensors, weights, torch.bfloat16)
    assert_same(read_checkpoint(tmp_path / "wide"), wide)
    held, ids = from_pretrained(directory, narrow=True), tokens(1, 5, vocab=64)
    assert torch.equal(held(input_ids=ids).logits, from_pretrained(directory)(input_ids=ids).logits)
    with pytest.raises(CheckpointError, match="not all weights are those of the checkpoint"):
        save_pretrained(held, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="text model among others.*--dequantise"):
        convert(directory, tmp_path / "same")
    quantised["ignore"] = ["language_model.lm_head"]
    nested(tmp_path / "wrong", tensors, {"quantization_config": quantised})
    with pytest.raises(CheckpointError, match="excludes language_model.lm_head"):
        open_checkpoint(tmp_path / "wrong")


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_the_names_of_a_wrapper_are_named_with_the_way_out(tmp_path, wrapper):
    tensors = renamed(released_tensors(CONFIG), lambda name: wrapper + name)
    write_checkpoint(tmp_path, tensors, CONFIG)
    way_out = f"save the model inside it .model.{wrapper.removesuffix('.')}"
    with pytest.raises(CheckpointError, match=f"as a wrapper calls them, {wrapper}.*{way_out}"):
        open_checkpoint(tmp_path)


def test_multi_token_prediction_that_is_promised_and_not_there_is_said(tmp_path):
    config = CONFIG.replace(num_nextn_predict_layers=1)
    write_checkpoint(tmp_path, released_tensors(CONFIG), config)
    with pytest.warns(UserWarning, match="promises multi-token prediction, and no tensor is"):
        assert from_pretrained(tmp_path).mtp is None
