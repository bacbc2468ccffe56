"""Models that the auto classes build, load and save."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import NemotronHForCausalLM as TheirModel

from nemotron_v3 import from_pretrained
from nemotron_v3.hf import (
    NemotronHForCausalLM,
    accelerate,
    is_accelerated,
    register,
    undo,
    unregister,
)
from tests.hf.models import accelerated, close, tokens, transformers_model


@pytest.fixture
def registered():
    register()
    register()  # twice is once
    yield
    unregister()


@pytest.fixture
def checkpoint(tmp_path):
    """A bf16 checkpoint in transformers' spelling, and the model it came from."""
    model = transformers_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint", model


def stored(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_every_tensor_is_the_files(checkpoint, registered):
    path, saved = checkpoint
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    assert isinstance(model, NemotronHForCausalLM) and is_accelerated(model)
    expected, found = saved.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].to(torch.bfloat16), expected[name]) for name in expected)
    wide = {".".join(n.split(".")[4:]) for n, t in found.items() if t.dtype == torch.float32}
    theirs = set(NemotronHForCausalLM._keep_in_fp32_modules_strict) & {"gate.weight"}  # since 5.24
    assert wide == {"A_log", "D", "dt_bias", "gate.e_score_correction_bias"} | theirs
    assert model.dtype == torch.bfloat16


def test_it_computes_what_an_accelerated_model_does(checkpoint, registered):
    path, saved = checkpoint
    ids = tokens(2, 25)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    expected = accelerate(saved.float())
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False),
        expected.generate(ids, max_new_tokens=8, do_sample=False),
    )
    assert close(undo(model)(ids).logits, undo(expected)(ids).logits, 0.0)


def test_saved_and_loaded_again(checkpoint, registered, tmp_path):
    path, _ = checkpoint
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.save_pretrained(tmp_path / "again")
    assert stored(tmp_path / "again").keys() == stored(path).keys()
    config = json.loads((tmp_path / "again" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["NemotronHForCausalLM"]
    assert config["model_type"] == "nemotron_h"
    ids = tokens(1, 12)
    expected = model(ids).logits
    for load in (AutoModelForCausalLM.from_pretrained, NemotronHForCausalLM.from_pretrained):
        assert torch.equal(load(tmp_path / "again")(ids).logits, expected)
    unregister()  # transformers' own class builds accelerated models until then
    assert close(TheirModel.from_pretrained(tmp_path / "again")(ids).logits, expected)
    assert close(from_pretrained(tmp_path / "again")(ids).logits, expected)


def test_an_accelerated_model_saves_what_the_plain_one_does(tmp_path):
    plain = transformers_model()
    plain.save_pretrained(tmp_path / "plain")
    accelerated(plain).save_pretrained(tmp_path / "ours")
    expected, found = stored(tmp_path / "plain"), stored(tmp_path / "ours")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    a, b = ((tmp_path / who / "config.json").read_bytes() for who in ("plain", "ours"))
    assert a == b


@pytest.mark.parametrize("trust", [None, False, True])
def test_a_checkpoints_own_code_is_never_run(checkpoint, registered, trust):
    path, _ = checkpoint
    ran = path / "ran"
    (path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nclass NemotronHConfig: pass\n"
        "class NemotronHForCausalLM: pass\n"
    )
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {
        "AutoConfig": "own.NemotronHConfig",
        "AutoModelForCausalLM": "own.NemotronHForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    asked = {} if trust is None else {"trust_remote_code": trust}
    AutoConfig.from_pretrained(path, **asked)
    assert is_accelerated(AutoModelForCausalLM.from_pretrained(path, **asked))
    assert not ran.exists()


def test_unregister(checkpoint):
    path, _ = checkpoint
    register()
    unregister()
    assert not is_accelerated(AutoModelForCausalLM.from_pretrained(path))
    assert type(AutoConfig.from_pretrained(path)).__module__.startswith("transformers.")


@pytest.mark.parametrize("load", [TheirModel.from_pretrained, NemotronHForCausalLM.from_pretrained])
def test_a_device_map_with_weights_on_disk(tmp_path, load):
    pytest.importorskip("accelerate")
    plain = transformers_model()
    plain.save_pretrained(tmp_path)
    places = {"model.embeddings": "cpu", "model.norm_f": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i < 4 else "cpu" for i in range(6)}
    model = load(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert model.model.layers[0].mixer.A_log.is_meta
    ids, before = tokens(2, 15), None
    if not is_accelerated(model):
        before = model(ids).logits
        accelerate(model)
    assert close(model(ids).logits, plain(ids).logits)
    generated = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (model, plain))
    assert torch.equal(*generated)
    assert model.model.layers[0].mixer.A_log.is_meta
    undone = undo(model)(ids).logits
    assert before is None or torch.equal(undone, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_settings_stay_and_change_nothing(tmp_path, attention):
    plain = transformers_model()
    plain.save_pretrained(tmp_path)
    model = accelerate(TheirModel.from_pretrained(tmp_path, attn_implementation=attention))
    assert model.config._attn_implementation == attention
    ids = tokens(1, 12)
    expected = model(ids).logits
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, expected) and close(expected, plain(ids).logits)


def test_a_state_dict_in_the_spelling_of_files(tmp_path):
    """What a Trainer hands to a model when it resumes, in one piece or in shards."""
    plain = transformers_model()
    plain.save_pretrained(tmp_path)
    expected, state = plain.state_dict(), stored(tmp_path)
    names = sorted(state, key=lambda name: name[::-1])  # experts of a stack in different shards
    for shards in (1, 5):
        model = accelerate(transformers_model(initializer_range=0.3))
        for n in range(shards):
            shard = {name: state[name] for name in names[n::shards]}
            model.load_state_dict(shard, strict=shards == 1)
        found = model.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_dict_that_does_not_fit_is_refused(tmp_path):
    plain = transformers_model()
    plain.save_pretrained(tmp_path)
    state, model = stored(tmp_path), accelerated(plain)
    lost = state.pop("backbone.layers.1.mixer.experts.3.up_proj.weight")
    with pytest.raises(RuntimeError, match="Missing key.*layers.1.mixer.experts.up_proj"):
        model.load_state_dict(state)
    state["backbone.layers.1.mixer.experts.8.up_proj.weight"] = lost
    state["backbone.layers.9.norm.weight"] = lost
    with pytest.raises(RuntimeError, match="(?s)Unexpected key.*experts.8.*layers.9"):
        model.load_state_dict(state)
