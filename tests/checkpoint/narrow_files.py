"""Small checkpoints in 8 and 4 bits: each weight's stored tensors, and its values by definition."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3 import NemotronV3Config
from tests.checkpoint.files import released_tensors
from tests.layers.test_dequantise import by_definition, fp4_values
from tests.models import tiny_config

FP8 = torch.float8_e4m3fn

# Widths that are multiples of 128, as blocks need them, and small.
CONFIG = tiny_config(
    "ME*-", hidden_size=128, intermediate_size=128, moe_intermediate_size=128, vocab_size=64,
    moe_shared_expert_intermediate_size=128, n_routed_experts=3, num_experts_per_tok=2, n_group=1,
    moe_latent_size=None, num_nextn_predict_layers=0, dtype="bfloat16",
)  # fmt: skip


@dataclass
class Stored:
    """The `tensors` of one weight by the ends of their names, and its values in `dtype`."""

    tensors: dict[str, Tensor]
    by_definition: Callable[[torch.dtype], Tensor]


def nvfp4(N: int, K: int, generator: torch.Generator, twin: bool = False, w4a4: bool = True):
    """Random codes and scales; `twin` as compressed-tensors spells them."""
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator)
    scale = torch.rand(N, K // 16, generator=generator).mul(440).add(2).to(FP8)
    number = torch.rand((), generator=generator).add(0.5) * 1e-4
    if twin:
        number = (1 / number).reshape(1)
        tensors = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": number}
        tensors |= {"input_global_scale": torch.tensor([3.0])} if w4a4 else {}
    else:
        tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": number}
        tensors |= {"input_scale": torch.tensor(0.1)} if w4a4 else {}
    number = number.reshape(())
    return Stored(
        tensors, lambda dtype: by_definition(fp4_values(codes), scale, number, twin, dtype)
    )


# Shapes that a file may give the scales of FP8, by the number of tiles.
FP8_SCALES = {
    "tensor": lambda N, K: [(), (1,), (1, 1), (1, 1, 1)],
    "row": lambda N, K: [(N,), (N, 1)],
    "block": lambda N, K: [(N // 128, K // 128), (N // 128, 1, K // 128, 1)],
}
TILES = {
    "tensor": lambda N, K: (1, 1),
    "row": lambda N, K: (N, 1),
    "block": lambda N, K: (N // 128, K // 128),
}


def fp8(N: int, K: int, generator: torch.Generator, scales: str = "tensor", spelling: int = 0):
    """Random codes and scales; `spelling` is one of the shapes that the scales may have."""
    codes = torch.randn(N, K, generator=generator).mul(100).to(FP8)
    tiles = TILES[scales](N, K)
    scale = torch.rand(tiles, generator=generator).add(0.5) * 1e-3
    shape = FP8_SCALES[scales](N, K)[spelling]
    tensors = {"weight": codes, "weight_scale": scale.reshape(shape)}
    tensors |= {"input_scale": torch.tensor(0.1)}
    return Stored(tensors, lambda dtype: by_definition(codes.double(), scale, None, False, dtype))


def narrow_tensors(
    config: NemotronV3Config = CONFIG, twin: bool = False, fp8_scales: str = "tensor"
) -> tuple[dict[str, Tensor], dict[str, Stored]]:
    """What a mixed release holds: experts, shared experts and head in NVFP4, projections of mamba
    and MLPs in FP8, the rest wide, scales of a cache beside attention.

    Returns all tensors by name, and the narrow weights by theirs.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, weights = released_tensors(config), {}
    for name, tensor in list(tensors.items()):
        stored = None
        if "expert" in name or name == "lm_head.weight":
            stored = nvfp4(*tensor.shape, generator, twin, w4a4="shared" not in name)
        elif name.endswith(("in_proj.weight", "out_proj.weight")) and fp8_scales == "block":
            stored = fp8(*tensor.shape, generator, "row")  # whose rows are no multiple of 128
        elif name.endswith(("in_proj.weight", "out_proj.weight", "up_proj.weight")):
            stored = fp8(*tensor.shape, generator, fp8_scales)
        elif name.endswith("k_proj.weight"):
            tensors[name.replace("weight", "k_scale")] = torch.tensor(0.01)
        elif name.endswith("v_proj.weight"):
            tensors[name.replace("weight", "v_scale")] = torch.tensor(0.02)
        if stored is not None and not name.endswith("correction_bias"):
            del tensors[name]
            weights[name] = stored
            module = name.removesuffix("weight")
            tensors |= {module + leaf: part for leaf, part in stored.tensors.items()}
    return tensors, weights


def wide_tensors(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Stored], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same checkpoint with every narrow weight's values in `dtype`."""
    modules = {name.removesuffix("weight") for name in weights}
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name.removesuffix(name.rpartition(".")[2]) not in modules
        and not name.endswith(("k_scale", "v_scale"))
    }
    return rest | {name: stored.by_definition(dtype) for name, stored in weights.items()}
