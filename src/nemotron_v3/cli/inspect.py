"""`nemotron-v3 inspect`: what a model is made of and what it costs, from its config, and what a
checkpoint stores and takes, from its headers."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nemotron_v3.config import NemotronV3Config

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def inspect(target: str, /, seq_len: int = 4096, dtype: str = "bfloat16") -> None:
    """Show a model's layers, parameters, FLOPs a token, and bytes of state and checkpoint; of a
    checkpoint also the bits of each part, and what its weights take in memory.

    Args:
        target: name of a released model, directory with a config.json, or a JSON file.
        seq_len: tokens in the sequence that FLOPs and state are counted for.
        dtype: of weights, keys and values: bfloat16, float16, float32 or float64.
    """
    import torch
    from rich.console import Console

    from nemotron_v3.cli.inspect_weights import has_weights, weight_tables
    from nemotron_v3.config import PRESETS

    if dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(_DTYPES)}")
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}: give at least 1 token")
    config = read_target(target)
    console = Console(highlight=False)
    layers = f"{config.num_hidden_layers} layers: {config.hybrid_override_pattern}"
    console.print(layers, markup=False)
    console.print(_layers_table(config, seq_len))
    console.print(_totals_table(config, seq_len, getattr(torch, dtype)))
    if target not in PRESETS and has_weights(Path(target)):
        console.print(*weight_tables(Path(target), getattr(torch, dtype)), sep="\n")


def read_target(target: str) -> "NemotronV3Config":
    """The config of a released model, of a directory with a config.json, or of a JSON file.

    Raises `ValueError` for a name that is none of them: it names the nearest released model and
    lists all.
    """
    from nemotron_v3.config import PRESETS, NemotronV3Config

    if target not in PRESETS and Path(target).exists():
        return NemotronV3Config.from_json(target)
    try:
        return NemotronV3Config.preset(target)
    except ValueError as error:
        raise ValueError(f"{error}; nor is there a file or directory {target!r}") from None


def _layers_table(config: "NemotronV3Config", seq_len: int) -> "Table":
    """A row for each block type that occurs: what one such block costs."""
    from rich.table import Table

    from nemotron_v3.model import cost

    table = Table()
    table.add_column("block", no_wrap=True)
    for heading in ("count", "parameters each", "active each", "MFLOP a token each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (block, one), layers in _kinds(config).items():
        weights = cost.block_weights(one, block)
        table.add_row(
            block,
            f"{len(layers)}",
            f"{sum(weight.parameters for weight in weights):,}",
            f"{sum(weight.active for weight in weights):,}",
            f"{cost.block_flops(one, block, seq_len) / 1e6:,.1f}",
        )
    return table


def _kinds(config: "NemotronV3Config") -> "dict[tuple[str, NemotronV3Config], list[int]]":
    """The layers of each block type and, where blocks have sizes of their own, of each size."""
    found: dict[tuple[str, NemotronV3Config], list[int]] = {}
    for block in _types(config):
        for layer, own in enumerate(config.layers_block_type):
            if own == block:
                found.setdefault((block, config.of_block(layer)), []).append(layer)
    return found


def _types(config: "NemotronV3Config") -> list[str]:
    """The block types that occur."""
    from nemotron_v3.config import BLOCK_TYPES

    return [block for block in BLOCK_TYPES if block in config.layers_block_type]


def _told(config: "NemotronV3Config", block: str, layers: list[int]) -> str:
    """A block type, with its layers where others of the type have other sizes."""
    alike = len(layers) == config.layers_block_type.count(block)
    return block if alike else f"{block} {', '.join(map(str, layers))}"


def _sizes(config: "NemotronV3Config", block: str) -> str:
    """The sizes of a block of one type, in words."""
    if block == "mamba":
        heads = f"{config.mamba_num_heads} x {config.mamba_head_dim}"
        return (
            f"heads {heads}, groups {config.n_groups}, state {config.ssm_state_size}\n"
            f"conv {config.conv_kernel}, chunk {config.chunk_size}"
        )
    if block == "attention":
        heads = f"{config.num_attention_heads} x {config.head_dim}"
        return f"heads {heads}, key/value heads {config.num_key_value_heads}"
    if block == "mlp":
        return f"width {config.intermediate_size}"
    latent = f", latent {config.moe_latent_size}" if config.moe_latent_size else ""
    return (
        f"{config.num_experts_per_tok} of {config.n_routed_experts} experts\n"
        f"width {config.moe_intermediate_size}{latent}\n"
        f"shared expert, width {config.moe_shared_expert_intermediate_size}"
    )


def _totals_table(config: "NemotronV3Config", seq_len: int, dtype: "torch.dtype") -> "Table":
    """The whole model: sizes, parameters, FLOPs, state and checkpoint."""
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("figure", justify="right")
    sections = (
        _size_rows(config),
        _parameter_rows(config),
        _flop_rows(config, seq_len),
        _byte_rows(config, seq_len, dtype),
    )
    for rows in sections:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _size_rows(config: "NemotronV3Config") -> list[tuple[str, str]]:
    mtp = config.mtp_hybrid_override_pattern if config.num_nextn_predict_layers else "none"
    return [
        ("vocabulary", f"{config.vocab_size:,}"),
        ("hidden size", f"{config.hidden_size:,}"),
        *(
            (_told(config, block, layers), _sizes(one, block))
            for (block, one), layers in _kinds(config).items()
        ),
        ("multi-token prediction", mtp),
    ]


def _parameter_rows(config: "NemotronV3Config") -> list[tuple[str, str]]:
    from nemotron_v3.model.cost import parameters

    count = parameters(config)
    return [
        ("parameters", _billions(count.total)),
        ("with multi-token prediction", _billions(count.with_mtp)),
        ("active a token", _billions(count.active)),
        ("active without input embedding", _billions(count.active_without_embedding)),
    ]


def _flop_rows(config: "NemotronV3Config", seq_len: int) -> list[tuple[str, str]]:
    from nemotron_v3.model.cost import forward_flops, training_flops

    return [
        (f"forward FLOP a token at {seq_len:,}", _giga(forward_flops(config, seq_len))),
        (f"training FLOP a token at {seq_len:,}", _giga(training_flops(config, seq_len))),
    ]


def _byte_rows(
    config: "NemotronV3Config", seq_len: int, dtype: "torch.dtype"
) -> list[tuple[str, str]]:
    from nemotron_v3.model import cost

    name = str(dtype).removeprefix("torch.")
    ssm = str(config.mamba_ssm_cache_dtype).removeprefix("torch.")
    kv = cost.kv_bytes_per_token(config, dtype)
    return [
        (f"KV cache a token, {name}", _bytes(kv)),
        (f"KV cache at {seq_len:,} tokens", _bytes(kv * seq_len)),
        (f"SSM state a sequence, {ssm}", _bytes(cost.ssm_state_bytes(config))),
        (f"conv state a sequence, {name}", _bytes(cost.conv_state_bytes(config, dtype))),
        (f"checkpoint, {name}", _bytes(cost.checkpoint_bytes(config, dtype))),
        ("checkpoint tensors", f"{cost.checkpoint_tensors(config):,}"),
    ]


def _billions(count: int) -> str:
    return f"{count:,} ({count / 1e9:.2f} B)"


def _giga(flops: float) -> str:
    return f"{flops / 1e9:,.2f} G"


def _bytes(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.2f} {unit}"
    return f"{count} B"
