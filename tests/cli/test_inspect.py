import json

import pytest

from nemotron_v3.cli.inspect import inspect
from nemotron_v3.config import PRESETS, NemotronV3Config


def figures(text: str) -> dict[str, str]:
    """The cells of every row of two or more columns, by the first one."""
    rows = (line.strip("│┃ \n").split("│") for line in text.splitlines())
    return {row[0].strip(): " ".join(cell.strip() for cell in row[1:]) for row in rows if row[1:]}


def test_a_released_model(capsys):
    inspect("nemotron-3-super")
    text = capsys.readouterr().out
    assert "88 layers" in text
    found = figures(text)
    assert found["parameters"] == "120,668,707,840 (120.67 B)"
    assert found["with multi-token prediction"] == "123,611,033,088 (123.61 B)"
    assert found["active a token"] == "12,770,237,440 (12.77 B)"
    assert found["active without input embedding"] == "12,233,366,528 (12.23 B)"
    assert found["training FLOP a token at 4,096"] == "75.08 G"
    assert found["forward FLOP a token at 4,096"] == "25.03 G"
    assert found["KV cache a token, bfloat16"] == "8.00 KiB"
    assert found["KV cache at 4,096 tokens"] == "32.00 MiB"
    assert found["SSM state a sequence, float32"] == "160.00 MiB"
    assert found["conv state a sequence, bfloat16"] == "3.12 MiB"
    assert found["checkpoint tensors"] == "42,683"
    assert found["multi-token prediction"] == "*E"


def test_length_and_dtype(capsys):
    inspect("nemotron-3-nano-30b", seq_len=1000, dtype="float32")
    found = figures(capsys.readouterr().out)
    assert found["KV cache at 1,000 tokens"] == "11.72 MiB"
    assert found["checkpoint, float32"] == "117.64 GiB"
    assert found["multi-token prediction"] == "none"


def test_a_file_and_its_directory(tmp_path, capsys):
    config = NemotronV3Config(
        layers_block_type="M*-M", hidden_size=64, vocab_size=100, mamba_num_heads=8
    )
    config.to_json(tmp_path)
    inspect(str(tmp_path))
    from_directory = capsys.readouterr().out
    inspect(str(tmp_path / "config.json"))
    assert capsys.readouterr().out == from_directory
    found = figures(from_directory)
    assert "4 layers: M*-M" in from_directory
    assert found["mamba"].startswith("heads 8 x 64, groups 8, state 128")
    assert "moe" not in found


def test_the_whole_pattern_is_shown(capsys):
    for name in PRESETS:
        inspect(name)
        shown = capsys.readouterr().out.split("┏")[0].replace("\n", "")
        assert shown.endswith(NemotronV3Config.preset(name).hybrid_override_pattern)


def test_nothing_is_cut_off_at_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for name in PRESETS:
        inspect(name, seq_len=1_000_000, dtype="float32")
        assert "…" not in capsys.readouterr().out


def test_an_unknown_name_gets_the_nearest_and_all():
    with pytest.raises(ValueError, match="did you mean 'nemotron-h-56b'") as caught:
        inspect("nemotron-h-57b")
    assert all(name in str(caught.value) for name in PRESETS)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"hidden_size": 64})[:-1])
    with pytest.raises(ValueError, match=r"config\.json: not a whole JSON document"):
        inspect(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"seq_len": 0}, "seq_len is 0"), ({"dtype": "int8"}, "dtype is 'int8': give one of bfl")],
)
def test_options_are_checked(options, told):
    with pytest.raises(ValueError, match=told):
        inspect("nemotron-h-8b", **options)
