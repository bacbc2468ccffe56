"""Whole modules and single token rows that are trained beside LoRA."""

import copy

import pytest
import torch

from tests.accuracy import relative_error
from tests.adapters.tiny import disturb_adapter, transformers_model
from tests.models import tokens

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from nemotron_v3 import hf  # noqa: E402
from nemotron_v3.checkpoint import CheckpointError, convert  # noqa: E402
from nemotron_v3.hf.peft import add_lora, load_lora, lora_config  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = tokens(2, 13, vocab=258)
ROWS = sorted({*IDS[0, :3].tolist()})
SETTINGS = {
    "head": {"modules_to_save": ["lm_head"]},
    "embeddings": {"modules_to_save": ["embeddings", "lm_head"]},
    "rows": {"trainable_token_indices": {"embeddings": ROWS}},
}


def run(model):
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads if out.logits is None else {"logits": out.logits.detach()} | grads


@pytest.mark.parametrize("loss", ["logits", "linear"])
@pytest.mark.parametrize("name", list(SETTINGS))
def test_they_train_as_in_plain_transformers_and_load_again(tmp_path, name, loss):
    model = transformers_model()
    config = lora_config(model, r=3, **SETTINGS[name])
    hidden = copy.deepcopy(model)
    hidden.config.model_type = "any"  # by its name PEFT refuses out_proj
    plain = peft.get_peft_model(hidden, config)
    ours = add_lora(hf.accelerate(model, loss=loss), config).train()
    disturb_adapter(plain)
    ours.load_state_dict(plain.state_dict())
    double = copy.deepcopy(plain).double()
    double.config._experts_implementation = "eager"  # the others have no fp64
    true, theirs = run(double), run(plain)
    found = run(ours.eval() if loss == "logits" else ours)
    assert theirs.keys() >= found.keys() and len(found) > 10
    kinds = {"rows": ["trainable_tokens_delta"], "head": ["lm_head"]}
    for kind in kinds.get(name, ["lm_head", "embeddings"]):
        assert any(kind in key for key in found), kind
    roundoff = torch.finfo(torch.float32).eps / 2
    for key, tensor in found.items():
        allowed = 2 * relative_error(theirs[key], true[key]) + roundoff
        assert relative_error(tensor, true[key]) <= allowed, key
    ours.save_pretrained(tmp_path)
    again = load_lora(hf.accelerate(transformers_model()), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, ours.eval()(IDS).logits)


def test_rows_of_tokens_are_not_merged_without_a_word(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path / "base")
    hf.accelerate(model)
    config = lora_config(model, r=3, trainable_token_indices={"embeddings": ROWS})
    add_lora(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="trainable_token_indices"):
        convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_a_larger_vocabulary_asks_for_the_larger_model(tmp_path):
    model = transformers_model()
    model.save_pretrained(tmp_path / "base")
    hf.accelerate(model)
    model.resize_token_embeddings(270)
    wrapped = add_lora(model, lora_config(model, r=3, modules_to_save=["embeddings", "lm_head"]))
    disturb_adapter(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(255, 270)[None]
    with torch.no_grad():
        expected = wrapped.eval()(ids).logits
    with pytest.raises(ValueError, match=r"lm_head\.weight is \(270, 48\)"):
        load_lora(hf.accelerate(transformers_model()), tmp_path / "adapter")
    larger = hf.accelerate(transformers_model())
    larger.resize_token_embeddings(270)
    with torch.no_grad():
        assert torch.equal(load_lora(larger, tmp_path / "adapter")(ids).logits, expected)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is \(270, 48\)"):
        convert(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
