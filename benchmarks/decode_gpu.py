"""Decoding of a whole model of Nemotron-3 Nano's shape on a GPU, and each of its kernels alone.

bf16 weights and keys, fp32 states, random weights; every timed step is fed new random tokens, so
that its routes are fresh. Floors are the bytes that a step has to read and write, the experts that
were chosen counted, at the rate of a large copy in the same run. A kernel alone is timed as one
CUDA graph of its calls in all layers, whose weights therefore come from memory. The experts counted
are those that the last layer chose. Logits are held to `forward`'s first.
"""

import gc
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.rates import copy_rate, event_time
from benchmarks.table import OOM, Row, unavailable
from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.generation.graphs import why_not
from nemotron_v3.generation.graphs.graph import Graph, graphs_of

NANO = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "max_position_embeddings": 262144,
    "routed_scaling_factor": 2.5,
}
SHAPES = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 131072))  # rows, tokens they hold
STEPS, WARM = 60, 5
PREFILLED = 16384  # tokens of all rows at a time
SAMPLED_ROWS = 64
CLOSE = 5e-2  # of the logits in bf16, three steps behind the same prompt
FORWARD = "forward"


def rows() -> Iterator[Row]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = NemotronV3ForCausalLM(NemotronV3Config(**NANO, dtype=torch.bfloat16))
    model.eval().requires_grad_(False)
    assert (reason := why_not(model)) is None, reason
    copy_rate()
    _check(model)
    for batch, held in SHAPES:
        shape = f"{batch} x {held}"
        try:
            yield from _of(model, batch, held, shape)
        except torch.cuda.OutOfMemoryError:
            yield Row("decode", shape, "tokens/s", OOM)
        graphs_of(model).clear()
        gc.collect()
        torch.cuda.empty_cache()
    yield from _sampling(model)


def _of(model: NemotronV3ForCausalLM, batch: int, held: int, shape: str) -> Iterator[Row]:
    cache = _prefilled(model, batch, held)
    graph = _graph(model, cache, held + STEPS + WARM)
    milliseconds = _step_times(graph)
    ours = statistics.median(milliseconds)
    floor = sum(map(_bytes, _kernel_calls(graph))) / copy_rate() / 1e3
    beside = {FORWARD: batch / _forward_time(model, cache) * 1e3}
    yield Row("decode", shape, "tokens/s", batch / ours * 1e3, beside, True, batch / floor * 1e3)
    yield Row("capture", shape, "s", graph.seconds, more_is_better=False)
    for name, calls in _by_kernel(graph).items():
        least = sum(map(_bytes, calls)) / len(calls) / copy_rate()
        yield Row(name, shape, "us", _alone(calls), {}, False, least)
    graph.busy = False


def _prefilled(model: NemotronV3ForCausalLM, batch: int, held: int) -> NemotronHybridCache:
    cache = NemotronHybridCache(model.config, batch, torch.bfloat16, "cuda")
    piece = max(1, PREFILLED // batch)
    for start in range(0, held, piece):
        tokens = _tokens(model, batch, min(piece, held - start))
        with torch.no_grad():
            model(tokens, past_key_values=cache, logits_to_keep=1)
    return cache


def _tokens(model: NemotronV3ForCausalLM, *shape: int) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, shape, device="cuda")


def _graph(model: NemotronV3ForCausalLM, cache: NemotronHybridCache, length: int) -> Graph:
    graph = graphs_of(model).take(model, cache, length)
    graph.slots.load(cache, [])
    return graph


def _step_times(graph: Graph) -> list[float]:
    """Milliseconds of each step, each of new tokens, without a wait in between."""
    vocabulary = graph.plan.logits.shape[1]
    drawn = torch.randint(vocabulary, (WARM + STEPS, graph.slots.rows), device="cuda")
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(STEPS + 1)]
    for tokens in drawn[:WARM]:
        graph.slots.tokens.copy_(tokens)
        graph.replay()
    marks[0].record()
    for tokens, mark in zip(drawn[WARM:], marks[1:], strict=True):
        graph.slots.tokens.copy_(tokens)
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in zip(marks[:-1], marks[1:], strict=True)]


def _forward_time(model: NemotronV3ForCausalLM, cache: NemotronHybridCache) -> float:
    """Milliseconds of a step without a graph."""
    times = []
    for _ in range(8):
        tokens = _tokens(model, cache.batch_size, 1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model(tokens, past_key_values=cache)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


# --- kernels alone -------------------------------------------------------------------------------


def _kernel_calls(graph: Graph) -> list[partial]:
    return [call for call in graph.plan.calls if isinstance(call, partial)]


def _by_kernel(graph: Graph) -> dict[str, list[partial]]:
    """The calls of all layers by what they compute; a projection by its inputs and outputs."""
    found: dict[str, list[partial]] = {}
    for call in _kernel_calls(graph):
        name = call.func.__name__
        if name == "skinny_linear":
            weights = call.args[1:]
            name += f" {weights[0].shape[1]} -> {sum(map(len, weights))}"
        found.setdefault(name, []).append(call)
    return found


def _alone(calls: list[partial]) -> float:
    """Microseconds of a call, all layers' in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    cuda = torch.cuda.CUDAGraph()
    with torch.cuda.graph(cuda), torch.no_grad():
        for call in calls:
            call()
    return event_time(cuda.replay) / len(calls)


def _bytes(call: partial) -> int:
    """What a call has to read and write at least."""
    name, args, named = call.func.__name__, call.args, call.keywords
    if name == "skinny_linear":
        through = 1 if named.get("residual") is None else 2
        return sum(tensor.nbytes for tensor in args) + through * named["out"].nbytes
    if name == "decode_mamba2":
        projected, conv, ssm = args[:3]
        written = conv.nbytes // conv.shape[1]
        return projected.nbytes + conv.nbytes + written + 2 * ssm.nbytes + named["out"].nbytes
    if name == "decode_attention":
        qkv, keys, values, positions = args[:4]
        held = float(positions.double().mean()) / keys.shape[2]
        return int((keys.nbytes + values.nbytes) * held) + qkv.nbytes + named["out"].nbytes
    if name == "route":
        stream, router = args[:2]
        return stream.nbytes + router.gate.nbytes + args[3].normed.nbytes
    x, routed, shared, _, buffers = args
    total = x.nbytes + 2 * named["out"].nbytes
    if routed is not None:
        chosen = buffers.experts[buffers.experts >= 0].unique().numel()
        total += sum(weight.nbytes // len(weight) for weight in routed) * chosen
    return total + sum(weight.nbytes for weight in shared or ())


# --- the whole of generation ---------------------------------------------------------------------


def _sampling(model: NemotronV3ForCausalLM) -> Iterator[Row]:
    """Tokens a second of `generate`, drawn beside greedy."""
    prompts = _tokens(model, SAMPLED_ROWS, 256)
    ways = {"greedy": {}, "top-p 0.9": {"do_sample": True, "seed": 1, "top_p": 0.9}}
    rates = {name: _generated(model, prompts, options) for name, options in ways.items()}
    shape = f"{SAMPLED_ROWS} x 256"
    greedy = rates.pop("greedy")
    yield Row("generate, greedy", shape, "tokens/s", greedy)
    for name, rate in rates.items():
        yield Row(f"generate, {name}", shape, "tokens/s", rate, {"greedy": greedy})


def _generated(model: NemotronV3ForCausalLM, prompts: torch.Tensor, options: dict) -> float | str:
    """From the time that more tokens take; the prefill is in both."""

    def seconds(count: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=count, eos_token_id=[], **options)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    short, long = 8, 136
    try:
        seconds(short)
        before = statistics.median(seconds(short) for _ in range(3))
        after = statistics.median(seconds(long) for _ in range(3))
    except torch.cuda.OutOfMemoryError:
        return OOM
    if after <= before:
        return unavailable("the longer run took no longer")
    return len(prompts) * (long - short) / (after - before)


def _check(model: NemotronV3ForCausalLM) -> None:
    """Three steps of a graph against `forward`; raises where the logits differ."""
    cache = _prefilled(model, 2, 300)
    graph = _graph(model, cache, 512)
    for tokens in _tokens(model, 3, 2):
        graph.slots.tokens.copy_(tokens)
        ours = graph.replay().float()
        with torch.no_grad():
            true = model(tokens[:, None], past_key_values=cache).logits[:, -1].float()
        error = float((ours - true).norm() / true.norm())
        assert error < CLOSE, f"logits are off by {error:.1e}"
    graph.busy = False
