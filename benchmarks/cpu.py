"""Training, one block of experts, the loss and decoding on a CPU, beside transformers.

The configuration is small enough for a laptop and has every block type; both run fp32 with the
same weights on the same tokens. Answers are compared before anything is timed.
"""

import random
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lengths import documents, same
from benchmarks.measure import alternate, peak_memory
from benchmarks.table import Row
from benchmarks.turns import compares_peers
from nemotron_v3 import NemotronV3ForCausalLM, ops
from nemotron_v3.layout import SequenceLayout

BLOCKS = ("mamba", "moe", "mamba", "attention", "mamba", "moe", "mamba", "mlp")
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "layers_block_type": list(BLOCKS),
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "n_groups": 2,
    "ssm_state_size": 128,
    "conv_kernel": 4,
    "chunk_size": 128,
    "intermediate_size": 1024,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 256,
    "moe_shared_expert_intermediate_size": 512,
}
TOKENS = (1024, 2048, 4096)
PROMPT, NEW_TOKENS = 16, 256
LOSS = (2048, 256, 32768)
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": ops.linear_cross_entropy,
    "all logits": lambda h, w, targets: functional.cross_entropy(functional.linear(h, w), targets),
}
REPEATS = 5
CLOSE = 1e-4  # relative, Frobenius: fp32 through eight blocks, far below any mistake


def rows() -> Iterator[Row]:
    for section in sections().values():
        yield from section()


def sections() -> dict[str, Callable[[], Iterator[Row]]]:
    """The rows in parts of which each can be measured without the others, once answers agree."""
    check_answers()
    return {
        "training": _trainings,
        "new lengths": _new_lengths,
        "experts": _experts,
        "loss": _losses,
        "decoding": _decodings,
    }


def _trainings() -> Iterator[Row]:
    for tokens in TOKENS:
        yield from timed("training step", f"1 x {tokens}", tokens, {
            name: _training(who, tokens) for name, who in _names().items()
        })  # fmt: skip
        memory = {
            name: peak_memory("benchmarks.cpu:train", who, tokens)
            for name, who in _names().items()
            if name == "ours" or compares_peers()
        }
        shape = f"1 x {tokens}"
        yield Row("training, peak memory", shape, "GiB", memory.pop("ours"), memory, False)


def _new_lengths() -> Iterator[Row]:
    tokens = TOKENS[1]
    yield from timed("training step, lengths new in each", f"16 of {tokens}", tokens, {
        "ours": _packed(documents(tokens, 16)), "one length": _packed(same(tokens)),
    })  # fmt: skip


def _experts() -> Iterator[Row]:
    tokens = TOKENS[1]
    yield from timed("MoE block, training", f"1 x {tokens}", tokens, {
        name: _moe(who, tokens) for name, who in _names().items()
    })  # fmt: skip


def _decodings() -> Iterator[Row]:
    for batch in (1, 8):
        check_decoding(batch)
        yield from timed("greedy decoding", f"{batch} x {NEW_TOKENS}", batch * NEW_TOKENS, {
            name: _decoding(who, batch) for name, who in _names().items()
        })  # fmt: skip


def _names() -> dict[str, str]:
    """Models by the name that a row gives them."""
    return {"ours": "ours", _peer().NAME: "peer"}


def train(name: str, tokens: int) -> None:
    """Two training steps: what a process is watched at for its peak memory."""
    step = _training(name, tokens)
    step()
    step()


def _losses() -> Iterator[Row]:
    """The loss of a large vocabulary, forward and backward, beside all its logits at once."""
    tokens, width, vocabulary = LOSS
    steps = {name: _loss_step(name) for name in LOSSES}
    ours, plain = (step() for step in steps.values())
    for a, b in zip(ours, plain, strict=True):
        error = float((a - b).norm() / b.norm())
        assert error < CLOSE, f"the loss or a gradient is off by {error:.1e}: nothing is timed"
    del ours, plain
    shape = f"{tokens} x {width} x {vocabulary}"
    yield from timed("loss, forward + backward", shape, tokens, steps)
    memory = {
        name: peak_memory("benchmarks.cpu:take_loss", name)
        for name in LOSSES
        if name == "ours" or compares_peers()
    }
    yield Row("loss, peak memory", shape, "GiB", memory.pop("ours"), memory, False)


def take_loss(name: str) -> None:
    """One step of the loss: what a process is watched at for its peak memory."""
    _loss_step(name)()


def _loss_step(name: str) -> Callable[[], tuple[Tensor, ...]]:
    tokens, width, vocabulary = LOSS
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).mul_(width**-0.5).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)

    def step() -> tuple[Tensor, ...]:
        loss = LOSSES[name](hidden, weight, targets)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return step


def check_answers() -> None:
    """Give ours the peer's weights; AssertionError unless logits, loss and gradients agree."""
    _model("ours").load_state_dict(_model("peer").state_dict())
    ids = _ids(300)  # not a multiple of the chunk
    found = {}
    for name in MODELS:
        model = _model(name)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        gradients = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])
        found[name] = (out.logits.detach(), out.loss.detach(), gradients)
        model.zero_grad(set_to_none=True)
    for what, ours, theirs in zip(("logits", "loss", "gradients"), *found.values(), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < CLOSE, f"the {what} are {error:.1e} from the peer's: nothing is timed"


def check_decoding(batch: int) -> None:
    """AssertionError unless every token that one chose is a best one by the other's logits."""
    for chooser, judge in (("ours", "peer"), ("peer", "ours")):
        sequences = _decoding(chooser, batch)()
        with torch.no_grad():
            logits = _model(judge)(input_ids=sequences).logits[:, PROMPT - 1 : -1]
        chosen = logits.gather(-1, sequences[:, PROMPT:, None])[..., 0]
        behind = (logits.amax(-1) - chosen).max() / logits.abs().max()
        assert behind < CLOSE, f"{chooser} chose a token {behind:.1e} behind: nothing is timed"


def _peer() -> Any:
    """Imported on use: a process that measures our memory must not load it."""
    from benchmarks.peers import transformers_peer

    return transformers_peer


def _ours() -> nn.Module:
    return NemotronV3ForCausalLM(SIZES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ours": _ours,
    "peer": lambda: _peer().causal_lm(SIZES),
}


@cache
def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def _ids(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(SIZES["vocab_size"], (1, tokens), generator=generator)


def _training(name: str, tokens: int) -> Callable[[], None]:
    model, ids = _model(name), _ids(tokens)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids).loss.backward()

    return step


def _decoding(name: str, batch: int) -> Callable[[], Tensor]:
    """A prompt's prefill and so many tokens after it: `[batch, PROMPT + NEW_TOKENS]`."""
    model, prompts = _model(name).eval(), _ids(batch * PROMPT).view(batch, PROMPT)
    no_end = {
        "ours": {"eos_token_id": []},
        "peer": {"eos_token_id": None, "pad_token_id": 0, "do_sample": False, "use_cache": True},
    }

    def decode() -> Tensor:
        out = model.generate(prompts, max_new_tokens=NEW_TOKENS, **no_end[name])
        return out if isinstance(out, Tensor) else out.sequences

    return decode


def _packed(draw: Callable[[random.Random], list[int]]) -> Callable[[], None]:
    """A training step of ours on a pack of fresh tokens and lengths."""
    model, source = _model("ours"), random.Random(0)

    def step() -> None:
        layout = SequenceLayout.from_lengths(draw(source))
        ids = torch.randint(SIZES["vocab_size"], layout.shape)
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, labels=ids, layout=layout).loss.backward()

    return step


def _moe(name: str, tokens: int) -> Callable[[], None]:
    block = next(layer.mixer for layer in _model(name).model.layers if layer.block_type == "moe")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, SIZES["hidden_size"], generator=generator).requires_grad_()
    dy = torch.randn(x.shape, generator=generator)

    def step() -> None:
        block.zero_grad(set_to_none=True)
        x.grad = None
        block(x).backward(dy)

    return step


def timed(
    work: str, shape: str, tokens: int, variants: dict[str, Callable[[], Any]]
) -> Iterator[Row]:
    """By the clock with all threads; then with one thread by its processor time, which other work
    on the machine disturbs less."""
    seconds = alternate(variants, REPEATS, time.perf_counter)
    yield _row(work, shape, "tokens/s", tokens, seconds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = alternate(variants, REPEATS, time.process_time)
    finally:
        torch.set_num_threads(threads)
    yield _row(f"{work}, 1 thread", shape, "tokens/CPU-s", tokens, seconds)


def _row(work: str, shape: str, unit: str, tokens: int, seconds: dict[str, float]) -> Row:
    rates = {name: tokens / each for name, each in seconds.items()}
    return Row(work, shape, unit, rates.pop("ours"), rates)
