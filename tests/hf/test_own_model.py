"""The model of `nemotron_v3.from_pretrained` in a trainer: one error that names the way."""

import copy
import pickle

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.adapters import coverage, lora_targets
from nemotron_v3.hf import accelerate
from nemotron_v3.hf.peft import add_lora, load_lora
from tests.adapters.tiny import byte_tokenizer, texts

WAY = (
    r"(?s)AutoModelForCausalLM\.from_pretrained\(path\).*nemotron_v3\.hf\.accelerate\(model\)"
    r".*docs/transformers\.md"
)


def model() -> NemotronV3ForCausalLM:
    torch.manual_seed(0)
    return NemotronV3ForCausalLM(
        NemotronV3Config(
            layers_block_type="M*-", vocab_size=258, hidden_size=32, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
            mamba_num_heads=4, mamba_head_dim=8, n_groups=2, ssm_state_size=8,
        )
    )  # fmt: skip


class Rows(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> dict[str, list[int]]:
        return {"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}


def adapted():
    peft = pytest.importorskip("peft")
    own = model()
    targets = list(lora_targets(own).modules)
    return peft.get_peft_model(own, peft.LoraConfig(r=4, target_modules=targets))


@pytest.mark.parametrize("build", [model, lambda: model().model, adapted])
def test_a_trainer_says_which_model_it_takes(tmp_path, build):
    pytest.importorskip("accelerate")
    options = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(TypeError, match=WAY):
        Trainer(build(), options, train_dataset=Rows())


@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "Reward"])
@pytest.mark.parametrize("alone", [True, False])
def test_so_do_trls(tmp_path, name, alone):
    trl = pytest.importorskip("trl")
    batch = {"per_device_train_batch_size": 4, "num_generations": 2}
    batch = batch if name in ("GRPO", "RLOO") else {}
    options = getattr(trl, f"{name}Config")(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, **batch
    )
    given = {} if alone else {"processing_class": byte_tokenizer()}
    if name in ("GRPO", "RLOO"):
        given["reward_funcs"] = lambda completions, **_: [0.0] * len(completions)
    with pytest.raises(TypeError, match=WAY):
        getattr(trl, f"{name}Trainer")(model(), args=options, train_dataset=texts(), **given)


def test_an_adapter_by_the_way_that_the_error_names(tmp_path):
    for call in (add_lora, lambda own: load_lora(own, tmp_path)):
        with pytest.raises(ValueError, match=r"peft\.get_peft_model.*lora_targets\(model\)"):
            call(model())
    with pytest.raises(TypeError, match=r"AutoModelForCausalLM\.from_pretrained"):
        accelerate(model())
    wrapped = adapted()
    assert coverage(wrapped).covered_blocks == 3
    ids = torch.tensor([[5, 6, 7]])
    wrapped(input_ids=ids, labels=ids).loss.backward()
    reached = [p.grad for n, p in wrapped.named_parameters() if "lora_B" in n]
    assert reached and all(grad is not None and grad.any() for grad in reached)


def test_the_config_is_as_before_to_all_others():
    config = model().config
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.replace()):
        assert other == config and repr(other) == repr(config)
    assert "num_labels" not in config.to_dict()
