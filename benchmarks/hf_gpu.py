"""An accelerated transformers model on a GPU: a training step of 7 blocks of Nano's width, bf16.

Time is that of a forward and a backward pass by CUDA events, the median of several; memory is the
most that PyTorch had allocated during one, the model and its gradients included. The plain model
beside it runs the kernels that it finds (mamba_ssm, causal_conv1d) and `grouped_mm` experts; both
have the same weights, and their losses are compared before anything is timed.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM, logging

from benchmarks.table import OOM, Row, unavailable
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.hf import accelerate

logging.set_verbosity_error()

PATTERN = "MEMEM*E"
GIB = 2**30
REPEATS = 8
PEER = "transformers"
# The loss of ours may differ from the peer's by rounding in bf16, not by a mistake.
CLOSE = 2e-2
# Of the same widths as Nano's, for a CPU: to see that the script runs.
TINY: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64, "intermediate_size": 64,
}  # fmt: skip


def rows() -> Iterator[Row]:
    """The table; the first row raises if the losses disagree."""
    lengths = (4096, 8192) if torch.cuda.is_available() else (256,)
    losses: dict[str, float] = {}
    for tokens in lengths:
        measured = {name: _measure(make, tokens) for name, make in VARIANTS.items()}
        for name, (_, _, loss) in measured.items():
            if loss is not None:
                losses[name] = loss
        _check(losses)
        for n, (what, unit) in enumerate((("step", "ms"), ("peak memory", "GiB"))):
            values = {name: found[n] for name, found in measured.items()}
            ours = values.pop("linear loss")
            shape = f"{PATTERN}, 1 x {tokens}, bf16"
            yield Row(f"training, {what}", shape, unit, ours, values, more_is_better=False)


def sizes() -> dict[str, Any]:
    """Nano's, cut to `PATTERN`."""
    nano = NemotronV3Config.preset("nemotron-3-nano-30b")
    names = [
        "vocab_size", "hidden_size", "mamba_num_heads", "mamba_head_dim", "n_groups",
        "ssm_state_size", "conv_kernel", "chunk_size", "num_attention_heads",
        "num_key_value_heads", "head_dim", "intermediate_size", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group",
    ]  # fmt: skip
    found = {name: getattr(nano, name) for name in names}
    if not torch.cuda.is_available():
        found |= TINY
    kinds = {"M": "mamba", "E": "moe", "*": "attention"}
    return found | {"layers_block_type": [kinds[letter] for letter in PATTERN]}


def _plain() -> nn.Module:
    # Its steps are clamped at time_step_min, ours at time_step_limit, as the checkpoints say.
    config = NemotronHConfig(**sizes(), time_step_min=1e-9, use_cache=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = NemotronHForCausalLM._from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
        )
    return model.train()


VARIANTS: dict[str, Callable[[], nn.Module]] = {
    "linear loss": lambda: accelerate(_plain(), loss="linear"),
    "with logits": lambda: accelerate(_plain()),
    PEER: _plain,
}


def _measure(
    make: Callable[[], nn.Module], tokens: int
) -> tuple[float | str, float | str, float | None]:
    """Milliseconds and GiB of a step, and the loss; `OOM` where it does not fit."""
    try:
        return _step(make(), tokens)
    except torch.OutOfMemoryError:
        return OOM, OOM, None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _step(model: nn.Module, tokens: int) -> tuple[float, float | str, float]:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator).to(device)

    def run() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    for _ in range(3):
        loss = run()
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        milliseconds = (time.perf_counter() - start) * 1e3
        return milliseconds, unavailable("no GPU"), float(loss)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), torch.cuda.max_memory_allocated() / GIB, float(loss)


def _check(losses: dict[str, float]) -> None:
    """AssertionError unless all variants found the same loss."""
    print(f"losses: {losses}", file=sys.stderr)
    low, high = min(losses.values()), max(losses.values())
    assert high - low <= CLOSE * high, f"the losses differ: {losses}"
