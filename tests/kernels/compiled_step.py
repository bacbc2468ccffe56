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


def step(rows: int, dtype: torch.dtype) -> list:
    """The launches of one step: sources and options."""
    found: list = []
    with torch.device("meta"):
        model = NemotronV3ForCausalLM(NemotronV3Config(**NANO, dtype=dtype)).eval()
        cache = NemotronHybridCache(model.config, rows, dtype, "meta")
        plan = Plan(model, Slots(cache, rows, CAPACITY))
        with launches(found), torch.no_grad():
            for call in plan.calls:
                call()
    return found


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
        for dtype in (torch.bfloat16, torch.float32):
            for rows in numbers if dtype == torch.bfloat16 else numbers[:2]:
                for source, options in step(rows, dtype):
                    key = (source.hash(), tuple(sorted(options.items())))
                    if key not in made:
                        used = needs(source, options, architecture)
                        made[key] = used | {"rows": rows, "dtype": str(dtype)} | options
    print(json.dumps(list(made.values())))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(number) for number in sys.argv[2:]])
