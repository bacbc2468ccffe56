"""A tiny transformers model, a tokenizer and texts, all made here."""

import torch

PATTERN = ["mamba", "moe", "attention", "mlp", "mamba", "moe"]


def transformers_config(**changes):
    """Latent experts and all four block types. transformers floors dt at `time_step_min`: here too
    low to be met, so that both follow the same equation."""
    import transformers

    sizes = {
        "vocab_size": 258,
        "hidden_size": 48,
        "layers_block_type": PATTERN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 20,
        "mamba_num_heads": 6,
        "mamba_head_dim": 10,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "intermediate_size": 40,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 32,
        "moe_latent_size": 20,
        "time_step_min": 1e-6,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    return transformers.NemotronHConfig(**(sizes | changes))


def transformers_model(seed: int = 0, **changes):
    """In eval mode, with every tensor off its initial value."""
    import transformers

    torch.manual_seed(seed)
    model = transformers.NemotronHForCausalLM(transformers_config(**changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def byte_tokenizer():
    """A token a byte."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {"<pad>": 0, "<eos>": 1} | {letter: i + 2 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    )


def texts():
    import datasets

    return datasets.Dataset.from_list(
        [{"text": f"{a} plus {b} is {a + b}. " * (1 + a % 3)} for a in range(8) for b in range(8)]
    )


def disturb_adapter(model, seed: int = 0, spread: float = 0.2) -> None:
    """Move every trained tensor, so that the adapter is no longer without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.requires_grad:
                scale = 0.02 if "magnitude" in name else spread
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))
