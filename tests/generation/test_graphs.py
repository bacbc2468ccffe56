"""Steps on fixed buffers, which a CUDA graph holds on a GPU and plain calls on a CPU."""

import pytest
import torch

from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.generation import engine
from nemotron_v3.generation.graphs import GraphStep, say_once, why_not
from nemotron_v3.generation.graphs.fits import why_not_layers
from nemotron_v3.generation.graphs.graph import capacity_of, graphs_of, row_slots
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.ops.sampling.op import workspace_size

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 16,
    "n_groups": 2,
    "intermediate_size": 48,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "dtype": torch.float32,
}


def model_of(pattern: str = "ME*-M", **more) -> NemotronV3ForCausalLM:
    torch.manual_seed(0)
    config = NemotronV3Config(hybrid_override_pattern=pattern, **SIZES | more)
    model = NemotronV3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")) or "norm" in name:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def filled(model, lengths) -> tuple[NemotronHybridCache, list[torch.Tensor]]:
    prompts = [torch.randint(0, 61, (length,)) for length in lengths]
    cache = NemotronHybridCache(model.config, len(lengths), torch.float32)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        model(torch.cat(prompts), cu_seqlens=cu_seqlens, past_key_values=cache)
    return cache, prompts


@pytest.mark.parametrize(
    ("pattern", "more"),
    [
        ("ME*-M", {}),
        ("E", {"moe_latent_size": 16}),
        ("EM", {"n_group": 4, "topk_group": 2, "norm_topk_prob": False}),
        ("M*", {"residual_in_fp32": True, "use_conv_bias": True, "tie_word_embeddings": True}),
        ("*M-", {"attention_bias": True, "mlp_bias": True, "use_bias": True}),
    ],
)
def test_a_step_is_forwards(pattern, more):
    model = model_of(pattern, **more)
    cache, _ = filled(model, (3, 1, 7))
    truth = NemotronHybridCache(model.config, 3, torch.float32)
    truth.restore(cache.snapshot())
    step = GraphStep(model, cache)
    for _ in range(6):
        tokens = torch.randint(0, 61, (3,))
        with torch.no_grad():
            expected = model(tokens[:, None], past_key_values=truth).logits[:, 0]
        torch.testing.assert_close(step(tokens), expected, rtol=1e-4, atol=1e-5)
    step.settle({})
    step.close()
    assert cache.lengths == truth.lengths == (9, 7, 13)
    for layer, state in truth.states.items():
        for name, tensor in state.held(13).tensors().items():
            mine = getattr(cache.states[layer].held(13), name)
            torch.testing.assert_close(mine, tensor, rtol=1e-4, atol=1e-5)


def test_an_end_stops_a_row_alone():
    model = model_of()
    cache, _ = filled(model, (4, 4))
    before = cache.snapshot()
    step = GraphStep(model, cache, ends=[7])
    step(torch.tensor([7, 8]))
    step(torch.tensor([9, 8]))
    step.settle({0: 4})
    step.close()
    assert cache.lengths == (4, 6)
    for layer, state in cache.states.items():
        for name, tensor in state.held(4).tensors().items():
            assert torch.equal(tensor[0], getattr(before.states[layer], name)[0])


@pytest.fixture
def graphed(monkeypatch):
    """Generation as on a GPU, by the same calls without a graph."""
    monkeypatch.setattr(engine, "why_not", lambda model, ends=0: None)
    monkeypatch.setattr(engine.DecodeStep, "fits", staticmethod(lambda model, cache: False))
    monkeypatch.setattr(engine, "STEPS_AT_ONCE", 4)


def run(model, graph, prompts, cache=None, **options):
    return engine.generate(model, prompts, graph=graph, past_key_values=cache, **options)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("sampled", [False, True])
def test_generation_is_forwards(graphed, rows, sampled):
    model = model_of()
    prompts = [torch.randint(0, 61, (2 + 3 * row,)).tolist() for row in range(rows)]
    options = {"max_new_tokens": 14, "eos_token_id": [5, 17, 23, 40], "return_logprobs": True}
    if sampled:
        options |= {"do_sample": True, "seed": 3, "top_p": 0.9, "repetition_penalty": 1.1}
    mine = run(model, "auto", prompts, **options)
    expected = run(model, False, prompts, **options)
    assert torch.equal(mine.sequences, expected.sequences)
    assert mine.finish_reason == expected.finish_reason
    torch.testing.assert_close(mine.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    assert mine.cache.lengths == tuple(n - 1 for n in mine.lengths)
    for layer, state in expected.cache.states.items():
        longest = max(expected.cache.lengths)
        for name, tensor in state.held(longest).tensors().items():
            other = getattr(mine.cache.states[layer].held(longest), name)
            torch.testing.assert_close(other, tensor, rtol=1e-4, atol=1e-5)


def test_a_stream_that_is_left_leaves_what_was_told(graphed):
    model = model_of()
    prompts = [[1, 2, 3], [4, 5]]
    cache = NemotronHybridCache(model.config, 2, torch.float32)
    stream = engine.stream(model, prompts, past_key_values=cache, max_new_tokens=9, eos_token_id=[])
    told = [next(stream) for _ in range(4)]
    with pytest.raises(RuntimeError, match="still open"):
        cache.snapshot()
    stream.close()
    assert cache.lengths == (4, 3)  # all but the last of each
    whole = [prompts[row] + [t.token_id for t in told if t.row == row] for row in range(2)]
    rest = run(model, False, whole, cache, max_new_tokens=3, eos_token_id=[])
    plain = run(model, False, prompts, max_new_tokens=9, eos_token_id=[])
    assert rest.new_tokens[0] == plain.new_tokens[0][2:5]
    assert rest.new_tokens[1] == plain.new_tokens[1][2:5]


def test_a_longer_row_takes_a_larger_graph(graphed, monkeypatch):
    from nemotron_v3.generation.graphs import graph, step

    monkeypatch.setattr(graph, "SMALLEST_CAPACITY", 8)
    monkeypatch.setattr(step, "AHEAD", 4)
    monkeypatch.setattr(engine, "AHEAD", 4)
    model = model_of()
    options = {"max_new_tokens": 25, "eos_token_id": []}
    mine, expected = (run(model, g, [[1, 2, 3]], **options) for g in ("auto", False))
    assert torch.equal(mine.sequences, expected.sequences)
    assert len(graphs_of(model)._graphs) == 3  # of 8, 16 and 32 places


def test_weights_that_change_in_place_count_and_moved_ones_make_a_new_graph(graphed):
    model = model_of()
    options = {"max_new_tokens": 6, "eos_token_id": []}
    run(model, "auto", [[1, 2, 3]], **options)
    model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    mine, expected = (run(model, g, [[1, 2, 3]], **options) for g in ("auto", False))
    assert torch.equal(mine.sequences, expected.sequences)
    assert len(graphs_of(model)._graphs) == 1
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0), requires_grad=False)
    mine, expected = (run(model, g, [[1, 2, 3]], **options) for g in ("auto", False))
    assert torch.equal(mine.sequences, expected.sequences)
    assert len(graphs_of(model)._graphs) == 1


def test_stop_strings_end_rows(graphed):
    class Letters:
        def encode(self, text):
            return [ord(c) - 65 for c in text]

        def decode(self, ids):
            return "".join(chr(65 + i) for i in ids)

    model = model_of()
    options = {"max_new_tokens": 12, "eos_token_id": [], "tokenizer": Letters()}
    whole = run(model, False, ["ABC", "XYZ"], **options)
    stop = whole.text[0][3:5]
    mine, expected = (
        run(model, g, ["ABC", "XYZ"], stop_strings=[stop], **options) for g in ("auto", False)
    )
    assert torch.equal(mine.sequences, expected.sequences)
    assert mine.finish_reason == expected.finish_reason and "stop" in mine.finish_reason
    assert mine.cache.lengths == expected.cache.lengths


def test_sizes():
    assert [row_slots(n) for n in (1, 2, 3, 64, 65, 97, 128)] == [1, 2, 4, 64, 96, 128, 128]
    assert [capacity_of(n) for n in (1, 1024, 1025)] == [1024, 1024, 2048]


def test_a_fallback_on_a_gpu_is_said_once(caplog):
    for device in ("cpu", "cuda", "cuda"):
        say_once("for the test's sake", torch.device(device))
    assert [r.getMessage().endswith("for the test's sake") for r in caplog.records] == [True]


def test_a_model_on_a_cpu_has_no_graph():
    assert "needs an NVIDIA GPU" in why_not(model_of())


def test_layers_that_no_graph_knows():
    model = model_of("ME-")
    assert why_not_layers(model) is None
    model.model.layers[2].block_type = "another"
    assert why_not_layers(model) == "layer 2 is a block of type 'another', which no graph knows"
    model = model_of("ME-")
    model.model.layers[1].mixer.dispatcher = object()
    assert why_not_layers(model) == "model.layers.1.mixer sends its tokens elsewhere"


def test_numbers_of_modules_that_change_count(graphed):
    """A capture would keep them."""
    model = model_of()
    options = {"max_new_tokens": 8, "eos_token_id": []}
    first = run(model, "auto", [[1, 2, 3]], **options)
    router = model.model.layers[1].mixer.gate
    router.scaling_factor, router.top_k = 40.0, 1
    mine, expected = (run(model, g, [[1, 2, 3]], **options) for g in ("auto", False))
    assert torch.equal(mine.sequences, expected.sequences)
    assert not torch.equal(mine.sequences, first.sequences)


def test_a_step_that_cannot_load_leaves_its_graph_to_others(monkeypatch):
    model = model_of()
    cache, _ = filled(model, (3,))
    monkeypatch.setattr(Slots, "load", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        GraphStep(model, cache)
    assert not any(graph.busy for graph in graphs_of(model)._graphs)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 5, "temperature": 0.7, "top_k": 9, "min_p": 0.01},
        {"repetition_penalty": 1.3},
        {"do_sample": True, "seed": [3, 1, 2], "top_p": 0.8, "repetition_penalty": 0.9},
    ],
    ids=["drawn", "penalised", "both"],
)
def test_a_step_chooses_the_samplers_tokens(graphed, monkeypatch, options):
    """Over more than a block of numbers, several graphs, and rows that end at different times."""
    from nemotron_v3.generation import sampling
    from nemotron_v3.generation.graphs import drawing

    for module in (sampling, drawing):
        monkeypatch.setattr(module, "BLOCK", 6)
    calls = []
    eager = engine.Sampler.__call__
    monkeypatch.setattr(engine.Sampler, "__call__", lambda *a: calls.append(1) or eager(*a))
    model = model_of("M*")
    prompts = [[1, 2, 3], [4], [5, 6]]
    options |= {"max_new_tokens": 20, "eos_token_id": [7, 17, 23]}
    mine = run(model, "auto", prompts, **options)
    assert len(calls) == 1  # behind the prompts
    expected = run(model, False, prompts, **options)
    assert torch.equal(mine.sequences, expected.sequences)
    assert len(set(mine.lengths)) > 1 or options.get("seed") is None


def test_a_graph_of_greedy_steps_has_no_room_for_draws():
    greedy = workspace_size(64, 131072, draws=False)
    drawn = workspace_size(64, 131072, cuts=False)
    assert greedy < drawn / 16 < drawn < workspace_size(64, 131072)


def test_a_graph_serves_other_numbers_and_not_another_question(graphed):
    model = model_of("M")
    for options in (
        {"top_p": 0.5, "seed": 1},
        {"top_p": 0.9, "seed": 2, "temperature": 3.0},
        {"top_k": 5, "seed": 2},
    ):
        options |= {"max_new_tokens": 12, "eos_token_id": [], "do_sample": True}
        mine, expected = (run(model, g, [[1, 2, 3]], **options) for g in ("auto", False))
        assert torch.equal(mine.sequences, expected.sequences)
    assert len(graphs_of(model)._graphs) == 2


def test_a_rollback_window_is_kept(graphed):
    """Each row can be taken back as far as behind `forward`'s steps, and no further."""
    model = model_of("M*M")
    prompts = [[1, 2, 3, 4, 5, 6], [4, 8], [5, 6]]
    caches = [NemotronHybridCache(model.config, 3, rollback_window=3) for _ in range(2)]
    for cache in caches:  # what is left of a window counts on
        with torch.no_grad():
            model(torch.tensor([[1, 2, 3, 4], [4, 9, 9, 9], [5, 9, 9, 9]]), past_key_values=cache)
        cache.rollback([2, 3, 3])
    options = {"max_new_tokens": 9, "eos_token_id": [10, 23, 42]}
    mine, expected = (
        run(model, graph, prompts, cache, **options)
        for graph, cache in zip(("auto", False), caches, strict=True)
    )
    assert torch.equal(mine.sequences, expected.sequences) and len(set(mine.lengths)) == 3
    assert caches[0]._floors == caches[1]._floors
    for _ in range(3):
        for cache in caches:
            cache.rollback(1)
        longest = max(caches[0].lengths)
        for layer, state in caches[1].states.items():
            other = caches[0].states[layer].held(longest)
            for one, two in zip(state.held(longest).pair(), other.pair(), strict=True):
                torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="can be taken back 0 tokens"):
        caches[0].rollback(1)
