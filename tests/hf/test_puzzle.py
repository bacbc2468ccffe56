"""A model of transformers whose moe and mlp blocks have sizes of their own, accelerated."""

import copy
import random

import pytest
import torch
from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHForCausalLM

from tests.hf.models import accelerated, close, gradients, tokens, transformers_model


def own_sizes(model: NemotronHForCausalLM, seed: int) -> nn.Module:
    """`model` with each moe and mlp mixer exchanged for one of other sizes, as the code of such a
    release builds it: the model's config stays what it is."""
    chance = random.Random(seed)
    for layer, block in enumerate(model.model.layers):
        kind = type(block.mixer).__name__
        if kind not in ("NemotronHMoE", "NemotronHMLP"):
            continue
        config = copy.deepcopy(model.config)
        config.intermediate_size = chance.randrange(8, 60)
        config.n_routed_experts = chance.choice([4, 6, 8])
        config.num_experts_per_tok = chance.randrange(2, 4)
        config.moe_intermediate_size = chance.choice([8, 24, 40])
        config.moe_shared_expert_intermediate_size = chance.randrange(8, 40)
        config.n_group = config.topk_group = 1
        more = {"layer_idx": layer} if kind == "NemotronHMLP" else {}
        block.mixer = type(block.mixer)(config, **more)
        for parameter in block.mixer.parameters():  # which transformers leaves empty
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("seed", range(3))
def test_each_block_keeps_its_own_sizes(seed):
    plain = own_sizes(transformers_model(), seed).eval()
    fast = accelerated(plain)
    ids = tokens(2, 9)
    for model in (plain, fast):
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        model.told = out.logits.detach(), gradients(model)
    assert close(fast.told[0], plain.told[0])
    assert fast.told[1].keys() == plain.told[1].keys()
    for name, gradient in plain.told[1].items():
        assert close(fast.told[1][name], gradient), name
    steps = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (plain, fast)]
    assert torch.equal(*steps)
