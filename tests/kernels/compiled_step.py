"""Compiles every kernel of a decode step of Nemotron-3 Nano for GPUs that are not here.

Run as a program, with an architecture (80, 89, 90) and numbers of rows: prints what each kernel
needs, as JSON. The step is planned on the meta device as on a GPU, and its launches are compiled.
"""

import json
import sys
from importlib import import_module
from unittest.mock import patch

import torch

from nemotron_v3 import NemotronHybridCache, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.generation.graphs.plan import Plan
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.ops.skinny_linear import LowRank, Norm, skinny_linear
from tests.kernels.compiled_calls import launches, needs

# Bytes of shared memory that one program may have.
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
CAPACITY = 2048
NANO = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "hybrid_override_pattern": "M*E",
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
    "max_position_embeddings": 4096,
}


def step(rows: int, dtype: torch.dtype, rank: int = 0) -> list:
    """The launches of one step: sources and options. With a rank also of low-rank updates."""
    found: list = []
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(NemotronV3Config(**NANO, dtype=dtype)).eval()
        if rank:
            model.model.layers[2].mixer.experts.add_low_rank(rank)
        cache = NemotronHybridCache(model.config, rows, dtype, "meta")
        plan = Plan(model, Slots(cache, rows, CAPACITY))
        with launches(found), torch.no_grad():
            for call in plan.calls:
                call()
            if rank:
                _updated_projections(rows, dtype, rank)
    return found


def _updated_projections(rows: int, dtype: torch.dtype, rank: int) -> None:
    """q, k and v behind a norm, and an output behind a norm of groups, each with an update."""
    for x_dtype, n, outputs, group in (
        (dtype, 2688, (4096, 256, 256), 0),
        (torch.float32, 4096, (2688,), 512),
    ):
        x = torch.empty(rows, n, dtype=x_dtype)
        weights = [torch.empty(m, n, dtype=dtype) for m in outputs]
        a, out = torch.empty(rank, n), torch.empty(rows, sum(outputs), dtype=dtype)  # a, b in fp32
        updates = tuple(LowRank(a, torch.empty(m, rank), 1.0) for m in outputs)
        norm = Norm(torch.empty(n, dtype=dtype), 1e-5, group)
        skinny_linear(x, *weights, norm=norm, low_rank=updates, out=out)


def main(architecture: int, numbers: list[int]) -> None:
    launchers = [
        import_module(f"nemotron_v3.ops.{op}.kernels.launch")
        for op in ("skinny_linear", "decode_experts")
    ]
    registry = import_module("nemotron_v3.ops.registry")
    made: dict[tuple, dict] = {}
    with (
        patch.object(registry.Op, "pick", lambda op, impl, tensors, *sizes: op.kernels()),
        patch.object(launchers[0], "shared_memory", lambda device: SHARED[architecture]),
        patch.object(launchers[1], "shared_memory", lambda device: SHARED[architecture]),
    ):
        for dtype, rank in ((torch.bfloat16, 0), (torch.float32, 0), (torch.bfloat16, 16)):
            for rows in numbers if (dtype, rank) == (torch.bfloat16, 0) else numbers[:2]:
                for source, options in step(rows, dtype, rank):
                    key = (source.hash(), tuple(sorted(options.items())))
                    if key not in made:
                        used = needs(source, options, architecture)
                        made[key] = used | {"rows": rows, "dtype": str(dtype)} | options
    print(json.dumps(list(made.values())))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(number) for number in sys.argv[2:]])
