"""Small checkpoints on disk that tests share, written by the safetensors library."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemotron_v3 import NemotronV3Config
from tests.models import tiny_config

MTP = "mtp.layers.0."


def released_tensors(config: NemotronV3Config, dtype: torch.dtype = torch.bfloat16) -> dict:
    """Random tensors by the names and shapes of the released files (facts about shapes are spelled
    out here on purpose, not asked from the model)."""
    c, generator = config, torch.Generator().manual_seed(0)
    D, E = c.hidden_size, c.n_routed_experts
    X = c.moe_latent_size or D
    inner, conv = c.mamba_num_heads * c.mamba_head_dim, c.conv_dim
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    F, S = c.moe_intermediate_size, c.moe_shared_expert_intermediate_size
    expert = {f"experts.{e}.up_proj.weight": (F, X) for e in range(E)}
    expert |= {f"experts.{e}.down_proj.weight": (X, F) for e in range(E)}
    latent = {"fc1_latent_proj.weight": (X, D), "fc2_latent_proj.weight": (D, X)}
    mixers: Mapping[str, dict[str, tuple[int, ...]]] = {
        "mamba": {
            "A_log": (c.mamba_num_heads,),
            "D": (c.mamba_num_heads,),
            "dt_bias": (c.mamba_num_heads,),
            "conv1d.weight": (conv, 1, c.conv_kernel),
            "conv1d.bias": (conv,),
            "in_proj.weight": (inner + conv + c.mamba_num_heads, D),
            "norm.weight": (inner,),
            "out_proj.weight": (D, inner),
        },
        "attention": {
            "q_proj.weight": (q, D),
            "k_proj.weight": (kv, D),
            "v_proj.weight": (kv, D),
            "o_proj.weight": (D, q),
        },
        "mlp": {
            "up_proj.weight": (c.intermediate_size, D),
            "down_proj.weight": (D, c.intermediate_size),
        },
        "moe": {
            "gate.weight": (E, D),
            "gate.e_score_correction_bias": (E,),
            "shared_experts.up_proj.weight": (S, D),
            "shared_experts.down_proj.weight": (D, S),
            **expert,
            **(latent if c.moe_latent_size else {}),
        },
    }
    shapes = {
        "backbone.embeddings.weight": (c.vocab_size, D),
        "backbone.norm_f.weight": (D,),
        "lm_head.weight": (c.vocab_size, D),
    }
    for i, block in enumerate(c.layers_block_type):
        shapes[f"backbone.layers.{i}.norm.weight"] = (D,)
        for name, shape in mixers[block].items():
            shapes[f"backbone.layers.{i}.mixer.{name}"] = shape
    if c.num_nextn_predict_layers:
        shapes |= {f"{MTP}enorm.weight": (D,), f"{MTP}eh_proj.weight": (D, 2 * D)}
        shapes |= {f"{MTP}mixer.experts.{e}.up_proj.weight": (F, X) for e in range(E)}
        shapes |= {f"{MTP}mixer.gate.e_score_correction_bias": (E,)}
    return {
        name: torch.randn(shape, generator=generator).to(
            torch.float32 if name.endswith("e_score_correction_bias") else dtype
        )
        for name, shape in shapes.items()
    }


def write_checkpoint(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: NemotronV3Config | Mapping | None = None,
    shards: int = 1,
) -> Path:
    """A checkpoint directory of one file, or of `shards` with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    config = tiny_config() if config is None else config
    if isinstance(config, NemotronV3Config):
        config.to_json(directory / "config.json")
    else:
        (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # none share memory
    names = list(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    places = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[k::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(t.numel() * t.itemsize for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def read_checkpoint(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, read by the safetensors library."""
    return {k: t for file in directory.glob("*.safetensors") for k, t in load_file(file).items()}


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.is_file()}


def fused(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with the experts of each layer stacked, `mtp.*` left alone."""
    stacks: dict[str, list[Tensor]] = {}
    rest = {}
    for name, tensor in tensors.items():
        head, found, tail = name.partition(".mixer.experts.")
        if found and not name.startswith("mtp."):
            projection = tail.split(".")[1]
            stacks.setdefault(f"{head}.mixer.experts.{projection}", []).append(tensor)
        else:
            rest[name] = tensor
    return rest | {name: torch.stack(parts) for name, parts in stacks.items()}


def renamed(tensors: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    return {rename(name): tensor for name, tensor in tensors.items()}


def with_model_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return renamed(tensors, lambda name: name.replace("backbone.", "model.", 1))


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    """Same names, dtypes, shapes and bits."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert torch.equal(bits(tensor), bits(b[name])), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
