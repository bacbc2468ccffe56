"""The configuration's file: read with every mistake named, written whole."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.train.build import read_model_config
from nemotron_v3.train.config_file import config_text, read_config
from nemotron_v3.train.options import (
    LogOptions,
    ModelOptions,
    OptimizerOptions,
    ScheduleOptions,
    TrainOptions,
)
from tests.train.fakes import made_up_options

OPTIONS = TrainOptions(
    out=Path('a "run" \\ here'),
    data=made_up_options(epochs=None),
    model=ModelOptions(preset="nemotron-3-nano-4b", config={"hidden_size": 64, "dtype": "float32"}),
    optimizer=OptimizerOptions(betas=(0.8, 0.9)),
    schedule=ScheduleOptions(minutes=3.5),
    log=LogOptions(details=0, wandb="mine"),
)


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return tmp_path / "run.toml"


@pytest.mark.parametrize(
    "options", [OPTIONS, replace(OPTIONS, data=made_up_options(epochs=2.5), seed=7)]
)
def test_what_is_written_reads_the_same(options, tmp_path):
    assert read_config(written(tmp_path, config_text(options)), TrainOptions) == options


MINIMAL = '[data]\nsources = [{ path = "a.txt" }]\ntokens_per_row = 64\nrows = 2\n'


@pytest.mark.parametrize(("size", "fine"), [(257, False), (258, True)])
def test_a_vocabulary_has_room_for_the_bytes_that_a_tokenizer_begins_with(size, fine, tmp_path):
    text = MINIMAL + f"[model.config]\nvocab_size = {size}\n"
    options = read_config(written(tmp_path, text), TrainOptions)
    if fine:
        options.check()
    else:
        with pytest.raises(ValueError, match="vocab_size is 257: a tokenizer that is made of"):
            options.check()
    given = replace(options, model=replace(options.model, tokenizer=tmp_path))
    given.check()


def test_a_key_that_is_misspelt_is_told_once(tmp_path):
    text = MINIMAL.replace("rows = 2", "row = 2")
    with pytest.raises(ValueError, match="data.row is no option: did you mean rows") as refused:
        read_config(written(tmp_path, text), TrainOptions)
    assert "lacks" not in str(refused.value)


def test_what_is_absent_has_its_default_and_values_can_be_put_over(tmp_path):
    path = written(tmp_path, MINIMAL)
    options = read_config(path, TrainOptions)
    assert options.data.rows == 2 and options.optimizer == OptimizerOptions()
    over = {"data": {"sources": [{"path": "b.jsonl"}]}}
    assert read_config(path, TrainOptions, over).data.sources[0].path == "b.jsonl"


def test_every_mistake_is_named_with_the_nearest_key(tmp_path):
    text = (
        MINIMAL
        + 'epohcs = 2\nworkers = -1.5\n[optimizer]\nlearning_rat = 1\nclip_norm = "1"\n'
        + 'moments = "4bit"\nbetas = [0.9]\n[optimiser]\n'
    )
    with pytest.raises(ValueError) as refused:
        read_config(written(tmp_path, text), TrainOptions)
    told = str(refused.value)
    for part in (
        "data.epohcs is no option: did you mean epochs",
        "data.workers is -1.5: an integer is needed",
        "optimizer.learning_rat is no option: did you mean learning_rate",
        "optimizer.clip_norm is '1': a number is needed",
        "optimizer.moments is '4bit': 'float32' or '8bit' is needed",
        "optimizer.betas is [0.9]: a list is needed",
        "optimiser is no option: did you mean optimizer",
    ):
        assert part in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data\n", "is no TOML"),
        ("seed = 1\n", "lacks data"),
        ("data = 3\n", "data is 3: a table is needed"),
        (MINIMAL.replace("rows = 2", "rows = 0"), "data: rows is 0"),
        (MINIMAL.replace('path = "a.txt"', 'path = "a", weight = -1'), r"data.sources\[0\]: a: w"),
    ],
)
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_config(written(tmp_path, text), TrainOptions)


def test_the_file_on_the_page_of_training_is_one(tmp_path):
    page = Path(__file__).parents[2] / "docs" / "training.md"
    (text,) = re.findall(r"^```toml\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    options = read_config(written(tmp_path, text), TrainOptions)
    options.check()
    assert read_model_config(options.model, torch.device("cpu")).hybrid_override_pattern == "ME*-"


@pytest.mark.parametrize("text", ["data = 5", "data = []", 'data = "x"'])
def test_a_table_that_is_none_is_told_also_where_the_command_line_writes_into_it(tmp_path, text):
    over = {"data": {"sources": [{"path": "a.txt"}]}}
    with pytest.raises(ValueError, match="data is .*: a table is needed"):
        read_config(written(tmp_path, text), TrainOptions, over)


def test_a_file_of_brackets_is_told(tmp_path):
    with pytest.raises(ValueError, match="is no TOML"):
        read_config(written(tmp_path, "a = " + "[" * 5000 + "]" * 5000), TrainOptions)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_of_a_fresh_model_is_said_once(key, tmp_path):
    config = {"hidden_size": 64, key: "bfloat16"}
    model = ModelOptions(preset="nemotron-3-nano-4b", config=config)
    assert read_model_config(model, torch.device("cpu")).dtype == torch.bfloat16
    twice = replace(OPTIONS, model=replace(model, dtype="float32"))
    with pytest.raises(ValueError, match=r"model\.dtype and a dtype in model\.config"):
        twice.check()


def test_a_misspelt_field_beside_a_preset_names_the_nearest(tmp_path):
    for preset in ("nemotron-3-nano-4b", str(tmp_path / "config.json")):
        if preset.endswith("json"):
            NemotronV3Config.preset("nemotron-3-nano-4b").to_json(tmp_path / "config.json")
        model = ModelOptions(preset=preset, config={"hiden_size": 64})
        with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
            read_model_config(model, torch.device("cpu"))
        model = ModelOptions(preset=preset, config={"hybrid_override_pattern": "M*"})
        assert read_model_config(model, torch.device("cpu")).num_hidden_layers == 2
