"""Presets of targets and the coverage table, against counts made by hand and against PEFT."""

import io
import json

import pytest
import torch
from rich.console import Console

from nemotron_v3 import NemotronV3Config
from nemotron_v3.adapters import DEFAULT_GROUPS, GROUPS, LoraTargets, coverage, lora_targets
from nemotron_v3.config import PRESETS
from nemotron_v3.model import cost
from tests.adapters.tiny import transformers_model
from tests.models import tiny_config, tiny_model

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MAMBA = ("in_proj", "out_proj")
SHARED = ("shared_experts.up_proj", "shared_experts.down_proj")
LATENT = ("fc1_latent_proj", "fc2_latent_proj")
MLP = ("mixer.up_proj", "mixer.down_proj")


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("nemotron-3-nano-4b", (*ATTENTION, *MAMBA, *MLP)),
        ("nemotron-3-nano-30b", (*ATTENTION, *MAMBA, *SHARED)),
        ("nemotron-3-super", (*ATTENTION, *MAMBA, *SHARED, *LATENT)),
    ],
)
def test_a_preset_of_targets_is_what_the_model_has(preset, expected):
    config = NemotronV3Config.preset(preset)
    assert lora_targets(config) == LoraTargets(expected)
    assert coverage(config, lora_targets(config)).covered_blocks == config.num_hidden_layers


def test_router_head_and_routed_experts_have_to_be_asked_for():
    excluded = set(GROUPS) - set(DEFAULT_GROUPS)
    assert excluded == {"routed", "router", "head"}
    assert all(GROUPS[name].why for name in GROUPS)
    config = tiny_config()
    assert lora_targets(config, ["routed", "router", "head"]) == LoraTargets(
        ("lm_head",), ("experts.up_proj", "experts.down_proj", "gate.weight")
    )


def test_the_counts_are_those_of_the_config():
    """ME*-M*E: by hand, and in all what the model's cost says."""
    config = tiny_config(moe_latent_size=20)
    table = coverage(config, lora_targets(config), rank=5)
    rows = {row.target: row for row in table.rows}
    D, inner = 48, 6 * 10
    in_proj = 2 * inner + 2 * 2 * 16 + 6
    expected = {
        "q_proj": (2, 80 * D, 80 + D),
        "k_proj": (2, 40 * D, 40 + D),
        "v_proj": (2, 40 * D, 40 + D),
        "o_proj": (2, 80 * D, 80 + D),
        "in_proj": (2, in_proj * D, in_proj + D),
        "out_proj": (2, inner * D, inner + D),
        "mixer.up_proj": (1, 40 * D, 40 + D),
        "mixer.down_proj": (1, 40 * D, 40 + D),
        "shared_experts.up_proj": (2, 32 * D, 32 + D),
        "shared_experts.down_proj": (2, 32 * D, 32 + D),
        "fc1_latent_proj": (2, 20 * D, 20 + D),
        "fc2_latent_proj": (2, 20 * D, 20 + D),
    }
    for target, (count, size, ranks) in expected.items():
        row = rows.pop(target)
        assert (row.covered, row.total) == (count, count), target
        assert row.covered_parameters == row.parameters == count * size, target
        assert row.adapter_parameters == count * 5 * ranks and row.fraction == 1.0, target
    for target in ("experts.up_proj", "experts.down_proj"):
        assert (rows[target].covered, rows[target].total) == (0, 2)
        assert rows.pop(target).parameters == 2 * 8 * 24 * 20
    assert rows.pop("gate.weight").parameters == 2 * 8 * D
    assert rows.pop("lm_head").parameters == rows.pop("embeddings").parameters == 97 * D
    (rest,) = rows.values()
    assert (rest.group, rest.covered) == ("other", 0)
    assert (table.covered_blocks, table.blocks) == (7, 7)
    held = dict(tiny_model(moe_latent_size=20).named_parameters())
    assert table.parameters == sum(tensor.numel() for tensor in held.values())
    assert table.covered_parameters == sum(c * size for c, size, _ in expected.values())
    assert table.adapter_parameters == 5 * sum(c * ranks for c, _, ranks in expected.values())
    assert table.fraction == table.covered_parameters / table.parameters


def test_stacks_count_an_adapter_for_each_expert():
    table = coverage(tiny_config(), LoraTargets((), ("experts.up_proj",)), rank=3)
    assert table.adapter_parameters == 2 * 3 * 8 * (24 + 48)
    assert (table.covered_blocks, table.blocks) == (2, 7)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_table_adds_up_to_the_released_model(preset):
    config = NemotronV3Config.preset(preset)
    table = coverage(config, lora_targets(config))
    biases = config.n_routed_experts * config.layers_block_type.count("moe")
    assert table.parameters == cost.parameters(config).total - biases


def test_attention_alone_is_seen_to_be_little():
    """What adapters of q, k, v and o alone reach: four blocks of forty-two."""
    table = coverage(NemotronV3Config.preset("nemotron-3-nano-4b"), ATTENTION, rank=16)
    assert (table.covered_blocks, table.blocks) == (4, 42)
    assert table.fraction < 0.04
    assert "4 of 42 blocks" in str(table)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["gate_proj"], "the target 'gate_proj' matches nothing: did you mean .*out_proj"),
        (["q_proj", "qproj"], "the target 'qproj' matches nothing: did you mean 'q_proj'"),
        (["mlp.down_proj"], "'mlp.down_proj' matches nothing: did you mean .*down_proj"),
        (["experts.up_proj"], r"it is a parameter: give it in LoraTargets\(parameters="),
        (LoraTargets((), ("q_proj",)), r"it is a module: give it in LoraTargets\(modules="),
        ("model.layers.9.*", "'model.layers.9.*' matches nothing.*The model has embeddings, in_"),
        ([], "no targets were given: the model has embeddings, in_proj"),
        (["norm"], "the target 'norm' matches nothing"),
        (["a_proj", "zz"], "(?s)'a_proj' matches nothing.*'zz' matches nothing"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_with_the_nearest(targets, message):
    with pytest.raises(ValueError, match=message):
        coverage(tiny_config(), targets)


def test_groups_that_are_not_there_are_told():
    with pytest.raises(ValueError, match="no group 'experts': did you mean"):
        lora_targets(tiny_config(), ["experts"])
    with pytest.raises(ValueError, match="nothing of latent, mlp: it has attention, mamba"):
        lora_targets(tiny_config("M*E"), ["attention", "latent", "mlp"])
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        coverage(tiny_model("M"))


def test_a_pattern_is_a_whole_name_and_names_end_with_targets():
    config = tiny_config()
    assert coverage(config, r"model\.layers\.[0-3]\.mixer\..*_proj").covered_blocks == 4
    assert coverage(config, ["layers.4.mixer.in_proj"]).covered_blocks == 1
    assert coverage(config, ["up_proj"]).covered_blocks == 3  # MLP and shared experts


def test_the_table_is_drawn_and_is_data():
    table = coverage(tiny_config(), lora_targets(tiny_config()), rank=2)
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    drawn = console.file.getvalue()
    assert "mamba out_proj" in drawn and "7 of 7 blocks" in drawn
    for row in table.rows:
        assert f"{row.covered} of {row.total}" in str(table)
    data = json.loads(json.dumps(table.as_dict()))
    assert data["adapter_parameters"] == table.adapter_parameters
    assert [row["covered"] for row in data["rows"]] == [row.covered for row in table.rows]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["in_proj", "out_proj", "mixer.up_proj"]},
        {"target_modules": ["q_proj", "embeddings", "lm_head"], "use_dora": False},
        {"target_modules": ["fc1_latent_proj"], "target_parameters": ["experts.up_proj"]},
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj", "experts.up_proj", "gate.weight"],
        },
    ],
)
def test_what_peft_adapts_is_what_the_plan_said(settings):
    pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model = transformers_model()
    model.config.model_type = "any"  # by its name PEFT refuses adapters of out_proj
    targets = LoraTargets(
        tuple(settings["target_modules"]), tuple(settings.get("target_parameters", ()))
    )
    planned = coverage(model, targets, rank=4)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings))
    there = coverage(wrapped)
    assert there == planned == coverage(wrapped, targets, rank=4)
    trained = sum(t.numel() for t in wrapped.parameters() if t.requires_grad)
    assert there.adapter_parameters == trained
    assert there.parameters == sum(
        t.numel() for name, t in wrapped.named_parameters() if "lora_" not in name
    )


def test_tensors_of_a_model_on_a_device_are_not_touched():
    model = tiny_model("M*")
    before = [tensor._version for tensor in model.parameters()]
    coverage(model, lora_targets(model), rank=1)
    assert [tensor._version for tensor in model.parameters()] == before
    assert all(tensor.device == torch.device("cpu") for tensor in model.parameters())
