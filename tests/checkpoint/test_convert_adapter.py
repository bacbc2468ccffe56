"""Merging LoRA adapters: PEFT makes them and says what they mean."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_v3.checkpoint import CheckpointError, convert, from_pretrained, save_pretrained
from tests.accuracy import relative_error
from tests.adapters.tiny import disturb_adapter, transformers_model
from tests.checkpoint.files import contents, read_checkpoint
from tests.models import tiny_model, tokens

PATTERN = "ME*-E"
LINEAR = ["q_proj", "o_proj", "in_proj", "out_proj", "shared_experts.up_proj", "fc1_latent_proj"]
ADAPTERS = {
    "linear": {"target_modules": [*LINEAR, "mixer.down_proj", "lm_head"]},
    "patterns": {
        "target_modules": LINEAR,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.4.mixer.in_proj": 5},
        "alpha_pattern": {"o_proj": 3, "layers.[0-3].mixer.in_proj": 40, "proj": 7},
    },
    "dora": {"target_modules": LINEAR, "use_dora": True},
    "embeddings": {"target_modules": ["embeddings", "out_proj"]},
    "stacks": {
        "target_modules": ["v_proj"],
        "target_parameters": ["experts.up_proj", "experts.down_proj"],
    },
    "one stack": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "whole tensors": {
        "target_modules": ["out_proj", "in_proj"],
        "modules_to_save": ["lm_head", "embeddings", "norm_f"],
        "bias": "all",
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformers model in fp32 and its checkpoint."""
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = transformers_model()
    path = tmp_path_factory.mktemp("base")
    model.save_pretrained(path)
    return model, path


def adapted(model, settings, directory):
    """A copy of `model` with a random adapter, saved to `directory`."""
    import peft

    model = copy.deepcopy(model)
    model.config.model_type = "any"  # by its name PEFT refuses adapters of out_proj
    config = peft.LoraConfig(r=4, lora_alpha=9, task_type="CAUSAL_LM", **settings)
    wrapped = peft.get_peft_model(model, config).eval()
    disturb_adapter(wrapped)
    wrapped.save_pretrained(directory)
    return wrapped


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(ADAPTERS))
@pytest.mark.parametrize("spelled", [{}, {"experts": "fused", "prefix": "model."}])
def test_the_merged_weights_are_those_of_peft(tmp_path, base, name, spelled):
    model, path = base
    wrapped = adapted(model, ADAPTERS[name], tmp_path / "adapter")
    if spelled:
        convert(path, tmp_path / "respelled", **spelled)
        path = tmp_path / "respelled"
    done = convert(path, tmp_path / "merged", adapter=tmp_path / "adapter")
    merged = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    true = copy.deepcopy(wrapped).double().merge_and_unload().state_dict()
    before = dict(model.state_dict())
    ours = from_pretrained(tmp_path / "merged").state_dict()
    assert ours.keys() == merged.keys() == true.keys()
    moved = 0
    for key, tensor in ours.items():
        if torch.equal(true[key].float(), before[key]):
            assert torch.equal(tensor, before[key]), key
            continue
        moved += 1
        allowed = 2 * relative_error(merged[key], true[key]) + torch.finfo(torch.float32).eps / 2
        assert relative_error(tensor, true[key]) <= allowed, key
    assert moved == len(done.adapter.tensors) > 0
    assert done.merged >= moved
    ids = tokens(2, 20, vocab=258)
    again = type(model).from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        expected, logits = wrapped(ids).logits, again(ids).logits
        assert not torch.allclose(expected, model(ids).logits, atol=1e-2)
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.fixture
def pair(tmp_path):
    """A checkpoint of ours and an adapter written by hand: `q_proj` and one expert, as a trainer
    that keeps experts apart and says `backbone.` would."""
    save_pretrained(tiny_model(PATTERN).to(torch.bfloat16), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "backbone.layers.2.mixer.q_proj.lora_A.weight": (3, 48),
        "backbone.layers.2.mixer.q_proj.lora_B.weight": (80, 3),
        "backbone.layers.4.mixer.experts.5.up_proj.lora_A.weight": (3, 48),
        "backbone.layers.4.mixer.experts.5.up_proj.lora_B.weight": (24, 3),
    }
    tensors = {
        f"base_model.model.{name}": torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }
    return tmp_path, tensors


def write_adapter(directory, tensors, **settings):
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6} | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def delta(tensors, module):
    name = f"base_model.model.backbone.layers.{module}.lora_"
    return 2.0 * tensors[f"{name}B.weight"].double() @ tensors[f"{name}A.weight"].double()


@pytest.mark.parametrize("experts", ["per_expert", "fused"])
def test_a_merge_into_bf16_rounds_once_and_leaves_the_rest_alone(pair, experts):
    tmp_path, tensors = pair
    write_adapter(tmp_path / "adapter", tensors)
    convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter", experts=experts)
    before = from_pretrained(tmp_path / "base").state_dict()
    after = from_pretrained(tmp_path / "merged").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    query, stack = "model.layers.2.mixer.q_proj.weight", "model.layers.4.mixer.experts.up_proj"
    assert changed == {query, stack}
    whole = before[stack].double()
    whole[5] += delta(tensors, "4.mixer.experts.5.up_proj")
    for name, true in (
        (query, before[query].double() + delta(tensors, "2.mixer.q_proj")),
        (stack, whole),
    ):
        # Rounded once from fp32: off by a roundoff of each value, and no more.
        off = (after[name].double() - true).abs()
        assert (off <= torch.finfo(torch.bfloat16).eps / 2 * 1.001 * true.abs()).all(), name


def test_layers_left_out_leave_out_their_adapters(pair):
    tmp_path, tensors = pair
    write_adapter(tmp_path / "adapter", tensors)
    done = convert(
        tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter", layers=(1, 2)
    )
    assert done.adapter.tensors == ("model.layers.1.mixer.q_proj.weight",)
    assert done.adapter.left_out > 0
    written = read_checkpoint(tmp_path / "merged")["backbone.layers.1.mixer.q_proj.weight"]
    before = read_checkpoint(tmp_path / "base")["backbone.layers.2.mixer.q_proj.weight"]
    true = before.double() + delta(tensors, "2.mixer.q_proj")
    assert relative_error(written, true) < torch.finfo(torch.bfloat16).eps / 2
    with pytest.raises(CheckpointError, match="the adapter changes nothing: all its"):
        convert(tmp_path / "base", tmp_path / "no", adapter=tmp_path / "adapter", layers=(0, 1))


Q = "base_model.model.backbone.layers.2.mixer.q_proj"


def edit(**changes):
    """An edit of the adapter's tensors: None removes one."""

    def apply(tensors):
        tensors |= {f"{Q}.{n.replace('__', '.')}": t for n, t in changes.items()}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    return apply


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {"peft_type": "LOHA"}, "of type 'LOHA'"),
        (None, {"init_lora_weights": "pissa_niter_4"}, "belongs to a base whose weights"),
        (None, {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        (None, {"layer_replication": [[0, 2]]}, "layer_replication is"),
        (None, {"alora_invocation_tokens": [3]}, "alora_invocation_tokens is"),
        (
            None,
            {"alpha_pattern": {".*_proj": 5, "q_proj": 3}},
            r"q_proj is matched by '\.\*_proj' \(5\) and 'q_proj' \(3\) of alpha_pattern",
        ),
        (edit(lora_B__weight=None), {}, "q_proj has lora_A alone"),
        (edit(lora_A__weight=torch.zeros(3, 47)), {}, r"A \(3, 47\) and B \(80, 3\), the weight"),
        (edit(lora_A__weight=torch.zeros(4, 48)), {}, r"A \(4, 48\) and B \(80, 3\)"),
        (edit(lora_A__weight=torch.full((3, 48), torch.inf)), {}, "not finite: .*lora_A"),
        (edit(lora_A__weight=torch.zeros(3, 48, dtype=torch.int8)), {}, "dtype: .*I8"),
        (edit(lora_magnitude_vector=torch.ones(3)), {}, r"lora_magnitude_vector \(3,\)"),
        (edit(gate=torch.ones(3)), {}, "has no model.layers.2.mixer.q_proj.gate"),
        (edit(bias=torch.ones(80)), {}, "unexpected: .*q_proj.bias"),
        (edit(weight=torch.ones(80, 2)), {}, r"q_proj.weight is \(80, 2\)"),
        (lambda tensors: {}, {}, "the adapter changes nothing"),
        (
            lambda t: {name.replace("layers.2", "layers.7"): v for name, v in t.items()},
            {},
            "has no model.layers.7.mixer.q_proj.weight",
        ),
        (
            lambda t: {name.replace("q_proj", "conv1d"): v for name, v in t.items()},
            {},
            "has no model.layers.2.mixer.conv1d",
        ),
        (
            lambda t: {
                "model.layers.0.mixer.conv1d.lora_A.weight": torch.zeros(3, 48),
                "model.layers.0.mixer.conv1d.lora_B.weight": torch.zeros(80, 3),
            },
            {},
            r"conv1d: A \(3, 48\)",
        ),
        (
            lambda t: {
                "model.layers.4.mixer.experts.lora_A.weight": torch.zeros(8, 11),
                "model.layers.4.mixer.experts.lora_B.weight": torch.zeros(24, 8),
            },
            {},
            "fit none of the checkpoint's stacks",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    pair, change, settings, message
):
    tmp_path, tensors = pair
    write_adapter(tmp_path / "adapter", change(tensors) if change else tensors, **settings)
    before = contents(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "base", tmp_path / "base", adapter=tmp_path / "adapter", overwrite=True)
    assert not (tmp_path / "merged").exists() and contents(tmp_path / "base") == before


def test_what_is_no_adapter_is_refused(pair):
    tmp_path, tensors = pair
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        convert(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", tensors)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        convert(tmp_path / "base", tmp_path / "merged", adapter=adapter)


def test_an_untrained_adapter_changes_no_bit(pair):
    tmp_path, tensors = pair
    tensors = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in tensors.items()}
    convert(tmp_path / "base", tmp_path / "merged", adapter=write_adapter(tmp_path / "a", tensors))
    assert contents(tmp_path / "base") == contents(tmp_path / "merged")


def test_a_head_that_is_the_embedding_matrix_stays_equal_to_it(tmp_path):
    save_pretrained(tiny_model(PATTERN, tie_word_embeddings=True), tmp_path / "base")
    name = "base_model.model.model.embeddings.lora_embedding_"
    tensors = {f"{name}A": torch.randn(3, 97), f"{name}B": torch.randn(48, 3)}
    convert(tmp_path / "base", tmp_path / "merged", adapter=write_adapter(tmp_path / "a", tensors))
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert not torch.equal(*(t["backbone.embeddings.weight"] for t in (before, after)))
    assert torch.equal(after["lm_head.weight"], after["backbone.embeddings.weight"])
    head = {f"base_model.model.lm_head.lora_{k}.weight": t for k, t in zip(
        "AB", (torch.randn(3, 48), torch.randn(97, 3)), strict=True)}  # fmt: skip
    with pytest.raises(CheckpointError, match=r"the checkpoint has no lm_head\.weight"):
        convert(tmp_path / "base", tmp_path / "no", adapter=write_adapter(tmp_path / "b", head))


ENDLESS = "((([a-z_.0-9])*)*)*!"


def twin(tensors):
    """The same weight by another spelling."""
    mine = {n: t for n, t in tensors.items() if "2.mixer.q_proj" in n}
    return tensors | {n.replace(".backbone.", "._orig_mod.model."): 2 * t for n, t in mine.items()}


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (twin, {}, r"twice: .*_orig_mod.*q_proj.lora_A.*backbone.*are one tensor"),
        (None, {"lora_alpha": float("nan")}, "lora_alpha is nan"),
        (None, {"lora_alpha": [6]}, r"lora_alpha is \[6\]"),
        (None, {"lora_alpha": 1e30}, r"lora_alpha is 1e\+30"),
        (None, {"r": 0}, "r is 0: an integer"),
        (None, {"r": True}, "r is True"),
        (None, {"r": 8}, "rank: .*q_proj has rank 3, adapter_config.json says 8"),
        (None, {"rank_pattern": {"q_proj": 2}}, "rank 3, adapter_config.json says 2"),
        (None, {"rank_pattern": {"q_proj": "3"}}, "rank_pattern gives '3' for 'q_proj'"),
        (None, {"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern gives inf"),
        (None, {"alpha_pattern": {ENDLESS: 8}}, "may take for ever to match"),
        (None, {"target_modules": ENDLESS}, "may take for ever to match"),
        (None, {"alpha_pattern": {"q_(": 8}}, "no regular expression"),
        (None, {"use_dora": True}, "q_proj has no lora_magnitude_vector, and use_dora is True"),
        (None, {"use_dora": "yes"}, "use_dora is 'yes'"),
        (None, {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        (None, {"bias": 3}, "bias is 3"),
        (None, {"target_modules": ["in_proj"]}, "target: .*q_proj has an adapter"),
        (
            None,
            {"target_modules": ["q_proj", "o_proj"], "target_parameters": ["experts.up_proj"]},
            r"target: model.layers.2.mixer.o_proj is among target_modules and has no tensors",
        ),
        (None, {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "leaves it out"),
        (None, {"modules_to_save": ["lm_head"]}, "'lm_head' of modules_to_save has no tensor"),
        (
            lambda t: t | {"base_model.model.backbone.norm_f.weight": torch.ones(48)},
            {},
            "whole: model.norm_f.weight is in the file",
        ),
        (None, {"trainable_token_indices": {"embeddings": [3]}}, "trainable_token_indices is"),
        (None, {"bias": "all"}, "bias: 'all' of them were trained, and the file has none"),
        (None, {"lora_alfa": 80}, "'lora_alfa' is no field: 'lora_alpha' may be meant"),
        (None, {"use_something": True}, "use_something is True: no field that is known here"),
        (None, {"something_config": {"a": 1}}, "something_config is"),
    ],
)
def test_a_config_that_cannot_be_is_refused_and_nothing_is_written(pair, change, settings, message):
    tmp_path, tensors = pair
    write_adapter(tmp_path / "adapter", change(tensors) if change else tensors, **settings)
    before = contents(tmp_path / "base")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert contents(tmp_path / "base") == before and not (tmp_path / "out").exists()


def test_every_spelling_of_the_names_merges_alike(pair):
    tmp_path, tensors = pair
    merged = []
    for i, prefix in enumerate(
        ("base_model.model.backbone.", "base_model.model._orig_mod.model.", "module.model.", "")
    ):
        named = {n.replace("base_model.model.backbone.", prefix): t for n, t in tensors.items()}
        adapter = write_adapter(tmp_path / f"adapter{i}", named)
        convert(tmp_path / "base", tmp_path / f"merged{i}", adapter=adapter)
        merged.append(from_pretrained(tmp_path / f"merged{i}").state_dict())
    for other in merged[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in merged[0].items())
