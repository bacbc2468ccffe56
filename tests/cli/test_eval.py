"""`nemotron-v3 eval` in this process."""

import json

import pytest

from nemotron_v3.cli import main as cli
from nemotron_v3.cli.eval_table import figure
from nemotron_v3.evaluation import Evaluation
from tests.cli.checkpoint import write_chat_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("NEMOTRON_V3_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "say what you mean"}\n{"text": "and mean it"}\n{"tex\n')
    return path


def test_a_table_with_a_row_a_checkpoint_and_a_file_with_the_same_figures(
    folder, data, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "300")  # names are paths, and fold in less
    out = tmp_path / "e.json"
    asked = ["eval", str(folder), str(folder), "--data", str(data), "--out", str(out)]
    assert cli.main([*asked, "--device", "cpu"]) == 0
    told = capsys.readouterr()
    found = Evaluation.read(out)
    assert len(found.checkpoints) == 2
    for checkpoint in found.checkpoints:
        (text,) = checkpoint.texts
        (row,) = [line for line in told.out.splitlines() if line.startswith(f" {checkpoint.name} ")]
        for value in (text.perplexity, text.bits_per_byte, text.bits_per_token):
            assert f" {value:,.4f} " in row
        assert f" {text.tokens:,} " in row
    assert "a.jsonl: 2 documents, 28 bytes" in told.out
    assert "1 lines are bad and left out" in told.err and ":3: not JSON" in told.err
    assert cli.main(asked) == 2
    assert "exists: give another name, or overwrite" in capsys.readouterr().err
    assert cli.main([*asked, "--overwrite", "--json"]) == 0
    again = Evaluation.from_dict(json.loads(capsys.readouterr().out))
    assert [c.texts for c in again.checkpoints] == [c.texts for c in found.checkpoints]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["P"], "there is nothing to measure: give --data or --tasks"),
        (["--data", "D"], "there is no checkpoint: give at least one folder"),
        (["no-such-folder", "--data", "D"], "no-such-folder"),
        (["P", "--data", "no-such-file.txt"], "no-such-file.txt does not exist"),
        (["P", "--data", "D", "--window", "0"], "window is 0"),
        (["P", "--data", "D", "--num-fewshot", "2"], "--num-fewshot is for tasks: give --tasks"),
        (["P", "P", "--data", "D", "--adapter", "x"], "--adapter belongs to one checkpoint"),
        (["P", "--data", "D", "--adapter", "x"], "x is no folder of an adapter"),
        (["P", "--data", "D", "--resume"], "goes on beside its file: give out too"),
        (["P", "--data", "D", "--dtype", "int8"], "dtype is 'int8'"),
        (["P", "--data", "D", "--device", "cudo"], "--device cudo"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(folder, data, capsys, args, told):
    args = [{"P": str(folder), "D": str(data)}.get(arg, arg) for arg in args]
    assert cli.main(["eval", *args]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("nemotron-v3: ") == 1


def test_figures_lose_no_digit_that_is_read():
    assert [figure(v) for v in (3.14159, 12345.678, 1e9, float("nan"))] == [
        "3.1416",
        "12,345.6780",
        "1e+09",
        "nan",
    ]
