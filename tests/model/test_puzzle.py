"""Models whose blocks have sizes of their own, against blocks of uniform models."""

import json
import random

import pytest
import torch
from torch import Tensor, nn

from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.checkpoint import audit, convert, from_pretrained, save_pretrained
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.layers import NemotronV3Block
from nemotron_v3.model import cost
from tests.checkpoint.files import assert_same, contents, read_checkpoint
from tests.models import disturb, tiny_config, tokens

SEEDS = range(4)


def puzzle(seed: int, pattern: str = "") -> NemotronV3Config:
    """A config with a random pattern in which every moe and mlp block has sizes of its own."""
    chance = random.Random(seed)
    pattern = pattern or "".join(chance.sample("MMEEE*--", 8))
    entries = []
    for block in tiny_config(pattern).layers_block_type:
        entry = {"block_type": block}
        if block == "mlp":
            entry["intermediate_size"] = chance.randrange(8, 50)
        if block == "moe":
            entry |= {
                "n_routed_experts": chance.choice([4, 6, 9]),
                "num_experts_per_tok": chance.randrange(1, 4),
                "moe_intermediate_size": chance.randrange(8, 40),
                "moe_shared_expert_intermediate_size": chance.randrange(8, 40),
                "moe_latent_size": chance.choice([None, 12, 20]),
            }
        entries.append(entry)
    return tiny_config(pattern, block_configs=entries)


def model_of(config: NemotronV3Config, seed: int = 0) -> NemotronV3ForCausalLM:
    torch.manual_seed(seed)
    model = NemotronV3ForCausalLM(config)
    disturb(model, torch.Generator().manual_seed(seed))
    return model


def uniform(config: NemotronV3Config, index: int) -> NemotronV3Config:
    """The config of a model whose blocks all have the sizes of one."""
    told = {k: v for k, v in config.to_dict().items() if k != "block_configs"}
    own = {k: v for k, v in config.to_dict()["block_configs"][index].items() if k != "block_type"}
    return NemotronV3Config.from_dict(told | {"model_type": "nemotron_h"} | own)


def by_definition(model: NemotronV3ForCausalLM, ids: Tensor) -> tuple[Tensor, list[nn.Module]]:
    """The logits of a chain of blocks, each built from a uniform config with the block's sizes."""
    config = model.config
    blocks = []
    for i, block in enumerate(model.model.layers):
        one = NemotronV3Block(uniform(config, i), i)
        one.load_state_dict(block.state_dict())
        blocks.append(one)
    hidden = model.model.embeddings(ids)
    for block in blocks:
        hidden = block(hidden)
    return model.lm_head(model.model.norm_f(hidden)), blocks


@pytest.mark.parametrize("seed", SEEDS)
def test_forward_and_gradients_are_those_of_each_block(seed):
    model = model_of(puzzle(seed))
    ids = tokens(2, 11)
    logits = model(input_ids=ids).logits
    expected, blocks = by_definition(model, ids)
    assert torch.equal(logits, expected)
    logits.square().mean().backward()
    ours = [{n: p.grad for n, p in block.named_parameters()} for block in model.model.layers]
    by_definition(model, ids)
    expected.square().mean().backward()
    for gradients, block in zip(ours, blocks, strict=True):
        for name, parameter in block.named_parameters():
            assert torch.equal(gradients[name], parameter.grad), name


@pytest.mark.parametrize("seed", SEEDS)
def test_a_cache_follows_the_blocks_in_any_pieces(seed):
    model = model_of(puzzle(seed)).double().eval()
    chance = random.Random(seed)
    ids = tokens(2, 19)
    whole = model(input_ids=ids).logits
    cache = NemotronHybridCache(model.config, 2, torch.float64)
    parts, start = [], 0
    while start < ids.shape[1]:
        stop = min(ids.shape[1], start + chance.choice([1, 1, 2, 5]))
        parts.append(model(input_ids=ids[:, start:stop], past_key_values=cache).logits)
        start = stop
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rows", [1, 3])
def test_generation_continues_as_the_forward_pass_says(rows):
    model = model_of(puzzle(1)).double().eval()
    told = model.generate(tokens(rows, 6), max_new_tokens=8, eos_token_id=None).sequences
    for position in range(6, 14):
        logits = model(input_ids=told[:, :position]).logits[:, -1]
        assert torch.equal(logits.argmax(-1), told[:, position])


def test_low_rank_updates_have_the_sizes_of_their_blocks():
    model = model_of(puzzle(2, "EMEE*"))
    ids = tokens(2, 7)
    before = model(input_ids=ids).logits
    for block in model.model.layers:
        if block.block_type == "moe":
            low = block.mixer.experts.add_low_rank(2)
            with torch.no_grad():
                for parameter in low.parameters():
                    parameter.normal_(std=0.3)
    beside = model(input_ids=ids).logits
    assert (beside - before).abs().max() > 1e-3
    for block in model.model.layers:
        if block.block_type == "moe":
            block.mixer.experts.merge_low_rank()
    torch.testing.assert_close(model(input_ids=ids).logits, beside, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_is_saved_loaded_and_converted_block_by_block(tmp_path, seed):
    model = model_of(puzzle(seed, "EM-E*-E"))
    save_pretrained(model, tmp_path / "made")
    told = json.loads((tmp_path / "made/config.json").read_text())
    assert told["model_type"] == "nemotron_h_puzzle"
    assert told["architectures"] == ["NemotronHPuzzleForCausalLM"]
    again = from_pretrained(tmp_path / "made")
    assert again.config.replace(dtype=None) == model.config
    assert_same(tensors_of(again), tensors_of(model))
    audit(again, tmp_path / "made")
    convert(tmp_path / "made", tmp_path / "fused", experts="fused", prefix="model.")
    convert(tmp_path / "fused", tmp_path / "back", experts="per_expert", prefix="backbone.")
    assert_same(read_checkpoint(tmp_path / "back"), read_checkpoint(tmp_path / "made"))
    convert(tmp_path / "made", tmp_path / "some", layers=[0, 2, 6])
    save_pretrained(from_pretrained(tmp_path / "made", layers=[0, 2, 6]), tmp_path / "same")
    assert contents(tmp_path / "some") == contents(tmp_path / "same")
    some = from_pretrained(tmp_path / "some")
    assert some.config.block_configs == tuple(model.config.block_configs[i] for i in (0, 2, 6))


@pytest.mark.parametrize("seed", SEEDS)
def test_its_cost_is_counted_block_by_block(seed):
    config = puzzle(seed)
    model = model_of(config)
    count = sum(t.numel() for t in tensors_of(model).values())
    assert cost.parameters(config).total == count
    blocks = range(config.num_hidden_layers)
    alone = [cost.forward_flops(uniform(config, i), 64) for i in blocks]
    one = [
        cost.block_flops(uniform(config, i), block, 64)
        for i, block in enumerate(config.layers_block_type)
    ]
    head = alone[0] - sum(
        cost.block_flops(uniform(config, 0), block, 64) for block in config.layers_block_type
    )
    assert cost.forward_flops(config, 64) == pytest.approx(sum(one) + head)
