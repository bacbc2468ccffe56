"""A folder that is given for a model's and is none says what it is, whoever is asked to read it."""

import json

import pytest

from nemotron_v3 import NemotronV3Config
from nemotron_v3.checkpoint import CheckpointError, from_pretrained
from nemotron_v3.data import PretrainedTokenizer

READERS = {
    "config": (NemotronV3Config.from_json, FileNotFoundError),
    "checkpoint": (from_pretrained, CheckpointError),
    "tokenizer": (PretrainedTokenizer.load, ValueError),
}


@pytest.fixture(params=READERS)
def refusal(request, tmp_path):
    """What a reader says of the folder `tmp_path`."""
    read, error = READERS[request.param]

    def told() -> str:
        with pytest.raises(error) as caught:
            read(tmp_path)
        return str(caught.value)

    return told


@pytest.mark.parametrize(
    ("about", "way_out"),
    [
        ({"base_model_name_or_path": "base/3"}, "adapter of base/3: give base/3, with the adapter"),
        ({}, "is a LoRA adapter: give the checkpoint that it was trained on"),
        ([], "is a LoRA adapter: give the checkpoint that it was trained on"),
    ],
)
def test_an_adapter_names_its_base(refusal, tmp_path, about, way_out):
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    told = refusal()
    assert way_out in told and f"--adapter {tmp_path}" in told


def test_a_run_without_a_checkpoint_says_how_it_goes_on(refusal, tmp_path):
    (tmp_path / "train.toml").write_text("")
    assert f"nemotron-v3 train {tmp_path} --resume" in refusal()


def test_any_other_folder_lacks_a_file(refusal, tmp_path):
    assert f"{tmp_path} has no " in refusal()
