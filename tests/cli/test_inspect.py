import json
import re

import pytest
import torch

from nemotron_v3.checkpoint.spelling import parse_size
from nemotron_v3.cli import main as cli
from nemotron_v3.cli.inspect import RELEASED, Inspect
from nemotron_v3.config import PRESETS, NemotronV3Config
from nemotron_v3.config.presets import preset_of_model_id
from nemotron_v3.model import cost


def inspect(target: str, **options) -> None:
    Inspect(target, **options).run()


def figures(text: str) -> dict[str, str]:
    """The last cell of every row, by the first one."""
    rows = (re.split(r"\s{2,}", line.strip()) for line in text.splitlines())
    return {row[0]: row[-1] for row in rows if row[1:]}


def test_figures_of_a_model_of_any_size_keep_their_digits(tmp_path, capsys):
    config = NemotronV3Config(
        layers_block_type="M*-M", hidden_size=64, vocab_size=100, mamba_num_heads=8
    )
    config.to_json(tmp_path)
    inspect(str(tmp_path), json=True)
    costs = json.loads(capsys.readouterr().out)
    inspect(str(tmp_path))
    text = capsys.readouterr().out
    found = figures(text)
    number, unit = found["forward FLOP a token at 4,096"].split()
    flops = float(number) * {"k": 1e3, "M": 1e6}[unit]
    assert flops == pytest.approx(costs["forward_flops_per_token"], rel=1e-2)
    assert (
        found["parameters"].startswith(f"{costs['parameters']:,}")
        and " B)" not in found["parameters"]
    )
    shown = re.search(r"^ mlp +1 .* (\S+) *$", text, re.MULTILINE)
    mlp = costs["blocks"]["mlp"]["forward_flops_per_token"]
    assert shown and float(shown[1]) == pytest.approx(mlp / 1e6, rel=1e-2)


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
        shown = capsys.readouterr().out.splitlines()[0]
        assert shown.endswith(NemotronV3Config.preset(name).hybrid_override_pattern)


def counts(costs: dict) -> set[str]:
    """The counts of a JSON object, which a table shows digit by digit."""
    objects = [costs, *costs["blocks"].values()]
    kinds = ("parameters", "active", "count", "layers", "vocab_size", "hidden_size", "checkpoint_t")
    return {f"{n:,}" for of in objects for key, n in of.items() if key.startswith(kinds)}


@pytest.mark.parametrize("columns", [None, "200", "60", "40"])
@pytest.mark.parametrize("name", PRESETS)
def test_no_number_is_cut_or_broken_at_any_width(capsys, monkeypatch, name, columns):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    inspect(name, json=True)
    costs = json.loads(capsys.readouterr().out)
    assert len(counts(costs)) > 10
    inspect(name)
    head, *rest = capsys.readouterr().out.splitlines()
    assert "…" not in "".join(rest)
    shown = {word.strip("(),:") for line in [head, *rest] for word in line.split()}
    assert counts(costs) - shown == set()
    if columns == "60":
        assert max(map(len, rest)) <= 60


def test_official_ids_and_folders_are_the_presets():
    assert RELEASED == PRESETS
    for model_id, preset in {
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "nemotron-3-nano-30b",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16": "nemotron-3-nano-30b",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4": "nemotron-3-nano-30b",
        "NVIDIA-Nemotron-3-Nano-4B-BF16": "nemotron-3-nano-4b",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "nemotron-3-super",
        "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16": "nemotron-3-ultra",
        "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4": "nemotron-3.5-lightning",
        "nvidia/Nemotron-H-4B-Instruct-128K": "nemotron-h-4b",
        "nvidia/Nemotron-H-8B-Base-8K": "nemotron-h-8b",
        "nvidia/Nemotron-H-47B-Reasoning-128K": "nemotron-h-47b",
        "nvidia/Nemotron-H-56B-Base-8K": "nemotron-h-56b",
        "nvidia/NVIDIA-Nemotron-Nano-9B-v2": "nemotron-nano-9b-v2",
        "nvidia/NVIDIA-Nemotron-Nano-12B-v2-Base": "nemotron-nano-12b-v2",
        "nvidia/NVIDIA-Nemotron-3-Nano-Omni-30B-A3B-BF16": None,
        "nvidia/Nemotron-Mini-4B-Instruct": None,
        "nvidia/NVIDIA-Nemotron-3-Super-49B": None,
        "": None,
    }.items():
        assert preset_of_model_id(model_id) == preset
    for preset in PRESETS:
        assert preset_of_model_id(preset) == preset


def test_a_model_id_shows_what_its_preset_shows(capsys):
    inspect("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16")
    by_id = capsys.readouterr().out
    inspect("nemotron-3-nano-30b")
    assert capsys.readouterr().out == by_id


def test_json_holds_the_numbers_of_the_cost_model(capsys):
    assert cli.main(["inspect", "nemotron-3-super", "--seq-len", "1000", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)
    config = NemotronV3Config.preset("nemotron-3-super")
    assert costs["parameters"] == cost.parameters(config).total
    assert costs["training_flops_per_token"] == cost.training_flops(config, 1000)
    assert costs["kv_cache_bytes"] == 1000 * cost.kv_bytes_per_token(config, torch.bfloat16)
    each = [of["count"] * of["parameters"] for of in costs["blocks"].values()]
    around = 2 * costs["vocab_size"] * costs["hidden_size"] + costs["hidden_size"]
    assert sum(each) + around == costs["parameters"]
    assert sum(of["count"] for of in costs["blocks"].values()) == costs["layers"] == 88


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


def test_rows_that_fit_a_memory(capsys):
    inspect("nemotron-3-nano-30b", memory="141GB", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["memory"] == 141_000_000_000
    rows = {int(length): fit for length, fit in told["rows_that_fit"].items()}
    assert list(rows) == sorted(rows) and list(rows.values()) == sorted(rows.values(), reverse=True)
    assert rows[1024] >= 512 and 16 <= rows[131072] <= 64
    inspect("nemotron-3-nano-30b", memory="40GB")
    assert figures(capsys.readouterr().out)["1,024"] == "none"
    with pytest.raises(ValueError, match="give one of them"):
        inspect("nemotron-3-nano-30b", memory="40GB", device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no such NVIDIA GPU"):
            inspect("nemotron-3-nano-30b", device="cuda")


def test_what_a_row_takes():
    from nemotron_v3.generation.graphs.memory import ASIDE, row_bytes, rows_that_fit

    config = NemotronV3Config.preset("nemotron-3-nano-30b")
    bf16 = torch.bfloat16
    longer = row_bytes(config, bf16, 8192) - row_bytes(config, bf16, 4096)
    assert longer == 6 * 1024 * 2 * 4096  # 6 KiB a token, in the graph and in the cache
    states = cost.ssm_state_bytes(config) + cost.conv_state_bytes(config, bf16)
    assert 45e6 < states < 55e6 and row_bytes(config, bf16, 1) > 2 * states
    rest = ASIDE + cost.checkpoint_bytes(config, bf16)
    each = row_bytes(config, bf16, 1024)
    found = [rows_that_fit(config, bf16, 1024, rest + rows * each) for rows in (1, 3, 63, 64, 100)]
    assert found == [1, 2, 32, 64, 96]
    assert rows_that_fit(config, bf16, 1024, rest + each - 1) == 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--memory", "x", "--memory 'x': give bytes, or text as '5GB'"),
        ("--memory", "0", "--memory '0'"),
        ("--plan", "gpus=8,gpus=4", "a size stands there twice"),
    ],
)
def test_a_value_that_cannot_be_is_told_by_its_option(capsys, option, value, message):
    assert cli.main(["inspect", "nemotron-3-nano-30b", option, value]) == 2
    assert message in capsys.readouterr().err


def test_a_memory_of_more_digits_than_a_float_has_is_a_number():
    assert parse_size("1" + "0" * 400) == 10**400
