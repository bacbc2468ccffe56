"""A tiny Nemotron-3 checkpoint with a byte tokenizer, to try the examples on."""

import os
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM, save_pretrained


def write_tiny_checkpoint(path: str | os.PathLike) -> Path:
    """All four block types, latent experts, 0.3 M parameters; untrained."""
    config = NemotronV3Config(
        hybrid_override_pattern="ME*-ME",
        vocab_size=258,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        mamba_num_heads=8,
        mamba_head_dim=16,
        ssm_state_size=32,
        n_groups=2,
        intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=96,
        moe_latent_size=32,
        initializer_range=0.1,
        # transformers floors dt here, nemotron_v3 at time_step_limit: too low to be met.
        time_step_min=1e-6,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype=torch.float32,
    )
    torch.manual_seed(0)
    save_pretrained(NemotronV3ForCausalLM(config), path)
    byte_tokenizer().save_pretrained(path)
    return Path(path)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
