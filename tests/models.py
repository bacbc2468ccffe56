"""Small models that tests share."""

from typing import Any

import torch

from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM, SequenceLayout

ALL_BLOCKS = "ME*-M*E"
WITHOUT_MOE = "M*-M"


def tiny_config(pattern: str = ALL_BLOCKS, **changes: Any) -> NemotronV3Config:
    """All four block types at sizes where nothing divides anything by luck."""
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "ssm_state_size": 16,
        "n_groups": 2,
        "conv_kernel": 4,
        "chunk_size": 16,
        "intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
        "routed_scaling_factor": 2.5,
    }
    return NemotronV3Config(hybrid_override_pattern=pattern, **(sizes | changes))


def tiny_model(pattern: str = ALL_BLOCKS, seed: int = 0, **changes: Any) -> NemotronV3ForCausalLM:
    """A tiny model whose every parameter matters: biases, D and router bias are drawn too."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    backend = changes.pop("backend", None)
    model = NemotronV3ForCausalLM(tiny_config(pattern, **changes), backend)
    disturb(model, generator)
    return model


@torch.no_grad()
def disturb(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move every tensor off its initial value, so that no 0 or 1 hides a term."""
    for tensor in [*model.parameters(), *model.buffers()]:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.add_(0.1 * noise.to(tensor.dtype))


def tokens(*shape: int, seed: int = 0, vocab: int = 97) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, shape, generator=generator)


def labels_of(ids: torch.Tensor, where: torch.Tensor | SequenceLayout) -> torch.Tensor:
    """The tokens as labels, -100 at the padding of a mask or of a layout."""
    if isinstance(where, SequenceLayout):
        where = where.unpack(torch.ones(where.num_tokens, dtype=torch.int64))
    return ids.masked_fill(where == 0, -100)
