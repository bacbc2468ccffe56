"""`nemotron-v3 convert`: what it asks of the library, what it shows, and what it refuses."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_v3.checkpoint import convert, from_pretrained, save_pretrained
from nemotron_v3.cli import main as cli
from nemotron_v3.cli.convert import parse_layers
from tests.checkpoint.files import contents
from tests.checkpoint.narrow_files import narrow_tensors
from tests.checkpoint.test_narrow import QUANTISED, write
from tests.models import tiny_model


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    save_pretrained(tiny_model("ME*-").to(torch.bfloat16), "source")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    return tmp_path


def write_adapter(path):
    path.mkdir()
    name = "base_model.model.model.layers.2.mixer.q_proj.lora_"
    tensors = {f"{name}A.weight": torch.randn(3, 48), f"{name}B.weight": torch.randn(80, 3)}
    save_file(tensors, path / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
    (path / "adapter_config.json").write_text(json.dumps(settings))


def test_every_option_reaches_the_library(source, capsys):
    write_adapter(source / "adapter")
    options = "--experts fused --prefix model --dtype float32 --max-shard-size 30KB --layers 0-1,2"
    line = ["convert", "source", "target", *options.split(), "--adapter", "adapter"]
    assert cli.main(line) == 0
    convert(
        "source",
        "expected",
        experts="fused",
        prefix="model.",
        dtype=torch.float32,
        max_shard_size="30KB",
        layers=(0, 1, 2),
        adapter="adapter",
    )
    assert contents(source / "target") == contents(source / "expected")
    shown, progress = capsys.readouterr()
    for told in ("source", "target", "merged", "adapter (rank 3)", "tokenizer.json", "q_proj"):
        assert told in shown
    assert "writing" in progress and "proving" in progress
    assert "every merged tensor is the fp64 sum of base and adapter" in shown
    assert "read again and equal to the bit" in shown


def test_a_dry_run_shows_the_plan_and_writes_nothing(source, capsys):
    before = contents(source / "source")
    assert cli.main(["convert", "source", "target", "--dtype", "float16", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "dry run: nothing was written" in shown
    cells = [re.split(r"\s{2,}", line.strip()) for line in shown.splitlines()]
    for row in (
        ["most weights", "bfloat16", "float16"],
        ["layers", "4", "4: ME*-"],
        ["experts", "per_expert", "per_expert"],
        ["copied", "tokenizer.json"],
    ):
        assert row in cells
    assert not (source / "target").exists() and contents(source / "source") == before
    # The plan of what would be refused is refused too.
    assert cli.main(["convert", "source", "source", "--dry-run"]) == 2
    assert "overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int4"], "dtype is 'int4': give one of bfloat16, bf16"),
        (["--layers", "0-x"], "layers is '0-x': give numbers and ranges"),
        (["--layers", "0,9"], "give layers between 0 and 3"),
        (["--max-shard-size", "lots"], "max_shard_size='lots'"),
        (["--adapter", "source"], "has no adapter_config.json"),
    ],
)
def test_a_mistake_is_told_and_nothing_is_written(source, capsys, options, message):
    assert cli.main(["convert", "source", "target", *options]) == 2
    told = capsys.readouterr().err
    assert told.startswith("nemotron-v3: ") and message in told
    assert not (source / "target").exists()


def test_json_says_what_was_done_and_nothing_else_is_on_stdout(source, capsys):
    write_adapter(source / "adapter")
    line = ["convert", "source", "target", "--adapter", "adapter", "--layers", "0-2", "--json"]
    assert cli.main([*line, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["written"] is False and planned["adapter"]["tensors"] == {}
    assert not (source / "target").exists()
    assert cli.main(line) == 0
    told = json.loads(capsys.readouterr().out)
    merged = told["adapter"].pop("tensors")
    planned["adapter"].pop("tensors")
    assert told == planned | {"written": True}
    assert (told["layers"], told["pattern"], told["merged_tensors"]) == ([0, 1, 2], "ME*", 1)
    assert told["adapter"] == {"path": "adapter", "ranks": [3]}
    (name,) = merged
    assert name.endswith("layers.2.mixer.q_proj.weight")
    before, after = (from_pretrained(path).state_dict() for path in ("source", "target"))
    (key,) = (k for k in after if not torch.equal(before[k], after[k]))
    moved = (after[key].double() - before[key].double()).norm() / before[key].double().norm()
    assert merged[name]["change"] == pytest.approx(moved.item(), rel=0.01)
    assert 0 < merged[name]["error"] <= 1


def test_an_adapter_that_changes_nothing_is_told(source, capsys):
    write_adapter(source / "adapter")
    tensors = load_file(source / "adapter" / "adapter_model.safetensors")
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    save_file(tensors, source / "adapter" / "adapter_model.safetensors")
    assert cli.main(["convert", "source", "target", "--adapter", "adapter"]) == 0
    assert "1 of them did not change" in capsys.readouterr().out


def test_a_plan_fits_60_columns_whatever_its_paths_are(source, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    target = f"{'long-' * 30}\x1b[31m"
    assert cli.main(["convert", "source", target, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60 and "…" not in shown and "\x1b" not in shown
    # The path's pieces stand below one another in the last column.
    path = shown.partition("source")[2].partition("tensors")[0]
    assert "".join(path.split()) == f"{'long-' * 30}␛[31m"


def test_overwriting_has_to_be_asked_for(source, capsys):
    assert cli.main(["convert", "source", "source", "--prefix", "model"]) == 2
    assert "source holds config.json" in capsys.readouterr().err
    assert cli.main(["convert", "source", "source", "--prefix", "model", "--overwrite"]) == 0
    convert("source", "back", prefix="backbone.")
    save_pretrained(tiny_model("ME*-").to(torch.bfloat16), "again")
    assert contents(source / "back") == contents(source / "again") | {"tokenizer.json": b"{}"}


def test_layers_are_numbers_and_ranges():
    assert parse_layers("0-3, 7,9-9") == (0, 1, 2, 3, 7, 9)
    for text in ("", "a", "1-", "-1", "1,,2", "0-1000000000000"):
        with pytest.raises(ValueError, match="layers is"):
            parse_layers(text)


def test_weights_in_4_and_8_bits_stay_or_get_their_values(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path / "made", narrow_tensors()[0], QUANTISED)
    made, wide = str(tmp_path / "made"), str(tmp_path / "wide")
    assert cli.main(["convert", made, wide, "--dequantise"]) == 0
    assert "nvfp4" in capsys.readouterr().out
    assert "quantization_config" not in (tmp_path / "wide" / "config.json").read_text()
    assert cli.main(["convert", made, str(tmp_path / "same")]) == 0
    files = ("model.safetensors", "config.json")
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
