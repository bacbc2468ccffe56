"""Adapters from files: all of one is loaded, or nothing and the model stays as it was."""

import json
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemotron_v3.checkpoint.adapter_config import KNOWN_FIELDS
from tests.adapters.tiny import disturb_adapter, transformers_model
from tests.models import tokens

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf  # noqa: E402
from nemotron_v3.hf.peft import add_lora, load_lora, lora_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PREFIX = "base_model.model."
IDS = tokens(2, 9, vocab=258)
FILE = "adapter_model.safetensors"


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory of an adapter with LoRA, DoRA and a whole head, and its logits."""
    model = hf.accelerate(transformers_model())
    config = lora_config(model, r=3, use_dora=True, modules_to_save=["lm_head"])
    wrapped = add_lora(model, config)
    disturb_adapter(wrapped)
    path = tmp_path_factory.mktemp("adapter")
    wrapped.save_pretrained(path)
    return path, logits(wrapped)


def changed(saved, directory, rename=lambda name: name, change=lambda t: None, **settings):
    """A copy of the adapter with other names (None: left out), tensors and settings."""
    shutil.copytree(saved[0], directory)
    tensors = load_file(directory / FILE)
    change(tensors)
    tensors = {new: t for name, t in tensors.items() if (new := rename(name))}
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    config = json.loads((directory / "adapter_config.json").read_text()) | settings
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def unwrapped(name):
    return name.removeprefix(PREFIX)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.replace(".model.model.", ".model.backbone."),
        lambda name: f"{PREFIX}_orig_mod.{unwrapped(name)}",
        lambda name: f"{PREFIX}module.{unwrapped(name)}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"{PREFIX}{name}",
        unwrapped,
        lambda name: unwrapped(name).replace("model.", "backbone.", 1),
        lambda name: name.removeprefix("base_model."),
        lambda name: name.replace(".mixer.", "._fsdp_wrapped_module.mixer."),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight"),
    ],
)
def test_other_names_for_the_same_load(tmp_path, saved, rename):
    path = changed(saved, tmp_path / "a", rename)
    loaded = load_lora(hf.accelerate(transformers_model()), path, is_trainable=True)
    assert torch.equal(logits(loaded), saved[1])
    assert any(parameter.requires_grad for parameter in loaded.parameters())


HANGING = "((([a-z_.0-9])*)*)*!"
BRANCHES = "(.a|a.|..)" * 30 + "!"
REFUSED = [
    ({"rename": lambda n: None if "layers.0." in n else n}, "0.mixer.in_proj.lora_A.*missing"),
    ({"rename": lambda n: None if "lm_head" in n else n}, "lm_head.weight is missing"),
    ({"rename": lambda n: None if "magnitude" in n else n}, "magnitude_vector is missing"),
    ({"rename": lambda n: n.replace("layers.0", "layers.9")}, r"layers\.9.*matches nothing"),
    ({"rename": lambda n: n.replace("in_proj", "in_prj")}, "in_prj.*matches nothing"),
    (
        {"change": lambda t: t.update({f"{PREFIX}backbone.norm_f.weight": torch.ones(48)})},
        "norm_f.weight matches nothing",
    ),
    (
        {"change": lambda t: t.update({n.replace(".model.model", ".model.backbone"): 0 * v
                                       for n, v in list(t.items()) if "q_proj.lora_A" in n})},
        "are one tensor",
    ),
    ({"change": lambda t: t[f"{PREFIX}lm_head.weight"].fill_(float("nan"))}, "holds NaN"),
    ({"change": lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(9, 48)})}, r"\(9, 48\)"),
    ({"change": lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(0, 48)})}, r"\(0, 48\)"),
    ({"use_dora": False}, "magnitude_vector matches nothing"),
    ({"r": 4}, r"lora_A.weight is \(3, "),
    ({"r": 0}, "r is 0"),
    ({"r": -3}, "r is -3"),
    ({"r": True}, "r is True"),
    ({"r": 3.0}, r"r is 3\.0"),
    ({"r": 2**40}, "r is 1099511627776"),
    ({"r": 10**400}, "401 digits"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
    ({"lora_alpha": "6"}, "lora_alpha is '6'"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"bias": "some"}, "bias is 'some'"),
    ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'"),
    ({"target_modules": [3]}, r"target_modules is \[3\]"),
    ({"target_modules": HANGING}, r"target_modules .* may take for ever"),
    ({"alpha_pattern": {HANGING: 8}}, r"alpha_pattern .* may take for ever"),
    ({"rank_pattern": {BRANCHES: 8}}, r"rank_pattern .* too many ways"),
    ({"alpha_pattern": {"q_proj(": 8}}, "no regular expression"),
    ({"alpha_pattern": {"(?i)q_proj": 8}}, "no regular expression"),
    ({"alpha_pattern": {"a" * 2000: 8}}, "2000 characters"),
    ({"alpha_pattern": {"q_proj": float("nan")}}, "alpha_pattern gives nan for 'q_proj'"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern gives 0"),
    ({"rank_pattern": [3]}, r"rank_pattern is \[3\]"),
    ({"layers_to_transform": [-1]}, r"layers_to_transform is \[-1\]"),
    ({"change": lambda t: t.update({f"{PREFIX}lm_head.weight": torch.ones(258, 48).int()})},
     "is torch.int32, not one of BF16"),
    ({"change": lambda t: t.update({f"{PREFIX}lm_head.weight":
                                    torch.ones(258, 48).to(torch.float8_e4m3fn)})},
     "is torch.float8_e4m3fn, not one of"),
    ({"peft_type": None}, "peft_type None is none of PEFT's"),
    ({"peft_type": "lora"}, "peft_type 'lora' is none of PEFT's"),
    ({"lora_alfa": 80}, "'lora_alfa' is no field: 'lora_alpha' may be meant"),
    ({"use_something": True}, "use_something is True: no field that is known here"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(tmp_path, saved, change, message, base):
    model, before = base
    path = changed(saved, tmp_path / "a", **change)
    modules = [(name, id(module)) for name, module in model.named_modules()]
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        load_lora(model, path)
    assert time.monotonic() - start < 5
    assert [(name, id(module)) for name, module in model.named_modules()] == modules
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model, "peft_config") and not model.training
    assert torch.equal(logits(model), before)


@pytest.fixture(scope="module")
def base():
    model = hf.accelerate(transformers_model())
    return model, logits(model)


def test_a_model_with_adapters_is_told_of_load_adapter(saved):
    model = hf.accelerate(transformers_model())
    load_lora(load_lora(model, saved[0]).unload(), saved[0])
    with pytest.raises(ValueError, match=r"load_adapter\(path, name\)"):
        load_lora(model, saved[0])


def test_ordinary_expressions_load(tmp_path, saved):
    targets = r"^(?!.*lm_head).*\.layers\.\d+\.(mixer|mixer\.shared_experts)\.\w+_proj"
    path = changed(saved, tmp_path / "a", target_modules=targets, alpha_pattern={r"layers\.\d+": 5})
    loaded = load_lora(hf.accelerate(transformers_model()), path)
    assert torch.equal(logits(loaded), saved[1])


@pytest.mark.parametrize("whole", ["lm_head.base_layer.weight", "lm_head.weight"])
def test_an_adapter_of_the_head_comes_with_the_head_it_was_trained_on(tmp_path, whole):
    trained = transformers_model()
    torch.nn.init.normal_(trained.lm_head.weight)
    wrapped = add_lora(hf.accelerate(trained), lora_config(trained, ["attention", "head"]))
    disturb_adapter(wrapped)
    wrapped.save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / FILE)
    head = tensors.pop(f"{PREFIX}lm_head.base_layer.weight")
    save_file(tensors | {PREFIX + whole: head}, tmp_path / "a" / FILE)
    loaded = load_lora(hf.accelerate(transformers_model()), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(wrapped))


def truncated(file):
    file.write_bytes(file.read_bytes()[:-8])


def folder_instead(file):
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("spoil", [truncated, folder_instead])
def test_a_file_that_cannot_be_read_is_a_value_error(tmp_path, saved, base, spoil):
    path = changed(saved, tmp_path / "a")
    spoil(path / FILE)
    with pytest.raises(ValueError, match="tensors of the adapter in .* cannot be read"):
        load_lora(base[0], path)
    assert torch.equal(logits(base[0]), base[1])


def test_no_field_of_pefts_is_unknown():
    fields = set(peft.LoraConfig().to_dict())
    assert fields <= KNOWN_FIELDS, "teach adapter_config.py the new fields of PEFT"
