"""Generation on a GPU by CUDA graphs: its tokens, its waits, and what it leaves behind."""

import gc
from collections.abc import Iterator

import pytest
import torch

from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.generation.graphs import GraphStep, why_not
from nemotron_v3.generation.graphs.graph import graphs_of
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.generation.sampling import BLOCK, Sampler

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.heavy,
]
WORDS = 1000
ALL = {"do_sample": True, "seed": 1, "temperature": 0.8, "top_k": 100, "top_p": 0.9, "min_p": 0.01}
WAYS = [{}, {"do_sample": True, "seed": 1, "top_p": 0.9}, ALL | {"repetition_penalty": 1.1}]


@pytest.fixture(scope="module")
def model() -> Iterator[NemotronV3ForCausalLM]:
    config = NemotronV3Config(
        vocab_size=WORDS,
        hidden_size=256,
        hybrid_override_pattern="M*EM",
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        mamba_num_heads=8,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=2,
        n_routed_experts=16,
        num_experts_per_tok=3,
        moe_intermediate_size=128,
        moe_shared_expert_intermediate_size=128,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        made = NemotronV3ForCausalLM(config).eval().requires_grad_(False)
    assert why_not(made) is None
    yield made
    graphs_of(made).clear()


def stepped(model, rows: int, options: dict) -> tuple[GraphStep, Sampler, torch.Tensor]:
    """A step behind some random tokens, a sampler as its own, and the tokens to feed."""
    cache = NemotronHybridCache(model.config, rows, torch.bfloat16, "cuda")
    prompts = torch.randint(WORDS, (rows, 20), device="cuda")
    with torch.no_grad():
        logits = model(prompts, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    told = GenerationOptions(**options)
    samplers = [Sampler(told, prompts.cpu(), WORDS, model.lm_head.weight) for _ in range(2)]
    first = [sampler(logits)[0] for sampler in samplers]
    assert torch.equal(*first)
    return GraphStep(model, cache, (), 400, samplers[0]), samplers[1], first[0]


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("options", WAYS, ids=["greedy", "top-p", "all"])
def test_a_graph_draws_what_the_sampler_draws(model, rows, options):
    """From the same logits, over more than a block of numbers."""
    step, sampler, tokens = stepped(model, rows, options)
    for _ in range(BLOCK + 6):
        tokens, _ = step.draw(tokens)
        again, _ = sampler(step._graph.plan.logits[:rows].clone())
        assert torch.equal(tokens, again)
    step.close()


@pytest.mark.parametrize("options", WAYS, ids=["greedy", "top-p", "all"])
def test_steps_do_not_wait(model, options):
    step, _, tokens = stepped(model, 3, options)
    for _ in range(3):
        tokens, _ = step.draw(tokens)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(BLOCK + 6):
            tokens, _ = step.draw(tokens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.close()


def test_many_generations_leave_nothing(model):
    """And each has the tokens of the first of its kind."""
    first, held = {}, []
    for i in range(300):
        kind = i % 4
        options = [*WAYS, {"eos_token_id": list(range(0, WORDS, 90))}][kind]
        prompts = [[1 + kind, 2, 3]] * (1, 3, 2, 1)[kind]
        out = model.generate(prompts, max_new_tokens=6, **({"eos_token_id": []} | options))
        tokens = out.sequences.tolist()
        assert first.setdefault(kind, tokens) == tokens, i
        del out
        if i % 100 == 99:
            gc.collect()
            held.append((torch.cuda.memory_allocated(), len(graphs_of(model)._graphs)))
    assert held[0] == held[-1]


def test_weights_changed_in_place_give_the_new_weights_tokens(model):
    options = {"max_new_tokens": 12, "eos_token_id": []}
    before = model.generate([[1, 2, 3]], **options).sequences
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    after = model.generate([[1, 2, 3]], **options).sequences
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    assert not torch.equal(before, after)
    assert torch.equal(model.generate([[1, 2, 3]], **options).sequences, before)


def test_low_rank_updates_in_the_graph(model):
    """Of every projection and expert: `forward`'s logits in fp32."""
    from types import SimpleNamespace

    pytest.importorskip("peft")
    from nemotron_v3.hf import lora

    torch.manual_seed(0)
    with torch.device("cuda"):
        updated = NemotronV3ForCausalLM(model.config.replace(dtype=torch.float32)).eval()
    groups = ("attention", "mamba", "shared", "routed")
    lora.add(updated, SimpleNamespace(rank=16, alpha=16.0, groups=groups, dropout=0.0))
    for name, parameter in updated.named_parameters():
        if "lora_B" in name or name.endswith(("up_b", "down_b")):
            parameter.data.normal_(std=0.05)
    updated.eval().requires_grad_(False)
    assert why_not(updated) is None
    for rows in (1, 5, 40):
        cache = NemotronHybridCache(updated.config, rows, torch.float32, "cuda")
        tokens = torch.randint(WORDS, (2, rows), device="cuda")
        with torch.no_grad():
            updated(tokens[0][:, None], past_key_values=cache)
            step = GraphStep(updated, cache)
            true = updated(tokens[1][:, None], past_key_values=cache).logits[:, 0]
        torch.testing.assert_close(step(tokens[1]), true, rtol=1e-3, atol=1e-4)
        step.close()
    graphs_of(updated).clear()
