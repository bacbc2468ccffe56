"""`nemotron-v3 inspect`: what a model is made of and what it costs, from its config, and what a
checkpoint stores and takes, from its headers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nemotron_v3.cli.dtypes import DTYPES, dtype_name
from nemotron_v3.cli.options import Choices
from nemotron_v3.cli.terminal import console_for, new_table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nemotron_v3.config import NemotronV3Config

# Of the released models; a test holds them to `nemotron_v3.config.PRESETS`, which needs torch.
RELEASED = (
    "nemotron-h-4b",
    "nemotron-h-8b",
    "nemotron-h-47b",
    "nemotron-h-56b",
    "nemotron-nano-9b-v2",
    "nemotron-nano-12b-v2",
    "nemotron-3-nano-4b",
    "nemotron-3-nano-30b",
    "nemotron-3-super",
    "nemotron-3-ultra",
    "nemotron-3.5-lightning",
)

LENGTHS = (1024, 8192, 32768, 131072, 1048576)  # of rows that are to fit a memory


@dataclass(frozen=True)
class Inspect:
    """Show a model's layers, parameters, FLOPs a token, and bytes of state and checkpoint.

    Of a checkpoint also the bits of each part, and what its weights take in memory.
    """

    target: Annotated[tyro.conf.Positional[str], Choices(RELEASED)]
    """name of a released model or its id on the hub, a folder with a config.json, or a JSON file"""
    seq_len: int = 4096
    """tokens in the sequence that FLOPs and state are counted for"""
    dtype: Annotated[str, Choices(tuple(DTYPES))] = "bfloat16"
    """of weights, keys and values: bfloat16, float16, float32 or float64 (bf16, fp16, ...)"""
    plan: str | None = None
    """also what training on several GPUs takes of each, such as gpus=8,ep=4: gpus, and ep or
    dp_replicate beside it; with --seq-len tokens a GPU in a pass"""
    moments: Literal["float32", "8bit"] = "float32"
    """of the optimiser, for --plan"""
    device: str | None = None
    """a GPU by its name (h100, h200, b200), or one that is here (cuda, cuda:1): also how many rows
    of how many tokens it holds in generation, and what --plan leaves of it"""
    memory: str | None = None
    """in the place of --device, the memory of a GPU, such as 80GB"""
    json: bool = False
    """print one JSON object"""

    def run(self) -> None:
        import torch

        from nemotron_v3.cli.inspect_weights import has_weights, weight_tables
        from nemotron_v3.config import PRESETS

        dtype = getattr(torch, dtype_name(self.dtype))
        if self.seq_len < 1:
            raise ValueError(f"seq_len is {self.seq_len}: give at least 1 token")
        config = read_target(self.target)
        costs = costs_of(config, self.seq_len, dtype)
        memory = self._memory()
        if memory is not None:
            costs |= {"memory": memory, "rows_that_fit": rows_of(config, dtype, memory)}
        if self.plan is not None:
            from nemotron_v3.cli.inspect_plan import costs_of_plan, plan_table

            costs["plan"] = costs_of_plan(config, self.plan, self.seq_len, dtype, self.moments)
        if self.json:
            print(json.dumps(costs, indent=2))
            return
        tables = [layers_table(costs), totals_table(costs, config)]
        if memory is not None:
            tables.append(rows_table(costs))
        if self.plan is not None:
            tables.append(plan_table(self.plan, costs["plan"], self.seq_len, memory))
        if self.target not in PRESETS and has_weights(Path(self.target)):
            tables += weight_tables(Path(self.target), dtype)
        console = console_for(*tables)
        layers = f"{costs['layers']} layers: {costs['pattern']}"
        console.print(layers, markup=False, soft_wrap=True)
        for table in tables:
            console.print(table)

    def _memory(self) -> int | None:
        """Bytes of the GPU that is asked about."""
        import torch

        from nemotron_v3.checkpoint.spelling import parse_size
        from nemotron_v3.cli.inspect_plan import DEVICES

        if self.memory is not None:
            if self.device is not None:
                raise ValueError("--device and --memory say the same thing: give one of them")
            return parse_size(self.memory, "--memory ")
        if self.device is None:
            return None
        if self.device in DEVICES:
            return DEVICES[self.device] * 2**30
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError(
                f"--device {self.device}: there is no such NVIDIA GPU here; give "
                f"{', '.join(DEVICES)}, or its memory: --memory 80GB"
            )
        return torch.cuda.get_device_properties(device).total_memory


def rows_of(config: "NemotronV3Config", dtype: "torch.dtype", memory: int) -> dict[int, int]:
    """Rows that fit, by tokens a row."""
    from nemotron_v3.generation.graphs.memory import rows_that_fit

    lengths = sorted({min(n, config.max_position_embeddings) for n in LENGTHS})
    return {length: rows_that_fit(config, dtype, length, memory) for length in lengths}


def rows_table(costs: dict[str, Any]) -> "Table":
    table = new_table("tokens a row", f"rows in {_bytes(costs['memory'])}")
    table.columns[1].justify = "right"
    for length, rows in costs["rows_that_fit"].items():
        table.add_row(f"{length:,}", f"{rows:,}" if rows else "none")
    return table


def read_target(target: str) -> "NemotronV3Config":
    """The config of a released model, of a directory with a config.json, or of a JSON file.

    Raises `ValueError` for a name that is none of them: it names the nearest released model and
    lists all.
    """
    from nemotron_v3.config import PRESETS, NemotronV3Config
    from nemotron_v3.config.files import exists
    from nemotron_v3.config.presets import preset_of_model_id

    if target not in PRESETS and exists(target):
        return NemotronV3Config.from_json(Path(target))
    try:
        return NemotronV3Config.preset(preset_of_model_id(target) or target)
    except ValueError as error:
        raise ValueError(f"{error}; nor is there a file or directory {target!r}") from None


def costs_of(config: "NemotronV3Config", seq_len: int, dtype: "torch.dtype") -> dict[str, Any]:
    """All figures, as JSON has them: counts, FLOPs and bytes as numbers."""
    from nemotron_v3.model import cost

    count = cost.parameters(config)
    kv = cost.kv_bytes_per_token(config, dtype)
    mtp = config.mtp_hybrid_override_pattern if config.num_nextn_predict_layers else None
    return {
        "layers": config.num_hidden_layers,
        "pattern": config.hybrid_override_pattern,
        "blocks": {
            _named(config, block, layers): {
                "count": len(layers),
                **_block_costs(one, block, seq_len),
            }
            for (block, one), layers in _kinds(config).items()
        },
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "multi_token_prediction": mtp,
        "parameters": count.total,
        "parameters_with_multi_token_prediction": count.with_mtp,
        "active_parameters": count.active,
        "active_parameters_without_input_embedding": count.active_without_embedding,
        "seq_len": seq_len,
        "forward_flops_per_token": cost.forward_flops(config, seq_len),
        "training_flops_per_token": cost.training_flops(config, seq_len),
        "dtype": _name(dtype),
        "ssm_dtype": _name(config.mamba_ssm_cache_dtype),
        "kv_cache_bytes_per_token": kv,
        "kv_cache_bytes": kv * seq_len,
        "ssm_state_bytes": cost.ssm_state_bytes(config),
        "conv_state_bytes": cost.conv_state_bytes(config, dtype),
        "checkpoint_bytes": cost.checkpoint_bytes(config, dtype),
        "checkpoint_tensors": cost.checkpoint_tensors(config),
    }


def _block_costs(config: "NemotronV3Config", block: str, seq_len: int) -> dict[str, Any]:
    """What one block of a type costs; `config` is that of the block."""
    from nemotron_v3.model import cost

    weights = cost.block_weights(config, block)
    return {
        "parameters": sum(weight.parameters for weight in weights),
        "active_parameters": sum(weight.active for weight in weights),
        "forward_flops_per_token": cost.block_flops(config, block, seq_len),
    }


def layers_table(costs: dict[str, Any]) -> "Table":
    """A row for each block type that occurs: what one such block costs."""
    table = new_table("block")
    for heading in ("count", "parameters\neach", "active\neach", "MFLOP a\ntoken each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for block, of_block in costs["blocks"].items():
        table.add_row(
            block,
            f"{of_block['count']}",
            f"{of_block['parameters']:,}",
            f"{of_block['active_parameters']:,}",
            _mega(of_block["forward_flops_per_token"]),
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


def _named(config: "NemotronV3Config", block: str, layers: list[int]) -> str:
    """A block type, with its layers where others of the type have other sizes."""
    alike = len(layers) == config.layers_block_type.count(block)
    return block if alike else f"{block} {', '.join(map(str, layers))}"


def _mamba_sizes(config: "NemotronV3Config") -> str:
    heads = f"{config.mamba_num_heads} x {config.mamba_head_dim}"
    return (
        f"heads {heads}, groups {config.n_groups}, state {config.ssm_state_size}\n"
        f"conv {config.conv_kernel}, chunk {config.chunk_size}"
    )


def _attention_sizes(config: "NemotronV3Config") -> str:
    heads = f"{config.num_attention_heads} x {config.head_dim}"
    return f"heads {heads}, key/value heads {config.num_key_value_heads}"


def _mlp_sizes(config: "NemotronV3Config") -> str:
    return f"width {config.intermediate_size}"


def _moe_sizes(config: "NemotronV3Config") -> str:
    latent = f", latent {config.moe_latent_size}" if config.moe_latent_size else ""
    return (
        f"{config.num_experts_per_tok} of {config.n_routed_experts} experts\n"
        f"width {config.moe_intermediate_size}{latent}\n"
        f"shared expert, width {config.moe_shared_expert_intermediate_size}"
    )


# The sizes of a block in words, by its type.
SIZES: dict[str, Callable[["NemotronV3Config"], str]] = {
    "mamba": _mamba_sizes,
    "attention": _attention_sizes,
    "mlp": _mlp_sizes,
    "moe": _moe_sizes,
}


def totals_table(costs: dict[str, Any], config: "NemotronV3Config") -> "Table":
    """The whole model: sizes, parameters, FLOPs, state and checkpoint."""
    table = new_table("", "")
    table.columns[1].justify = "right"
    for rows in (
        _size_rows(costs, config),
        _parameter_rows(costs),
        _flop_rows(costs),
        _byte_rows(costs),
    ):
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _size_rows(costs: dict[str, Any], config: "NemotronV3Config") -> list[tuple[str, str]]:
    return [
        ("vocabulary", f"{costs['vocab_size']:,}"),
        ("hidden size", f"{costs['hidden_size']:,}"),
        *(
            (_named(config, block, layers), SIZES[block](one))
            for (block, one), layers in _kinds(config).items()
        ),
        ("multi-token prediction", costs["multi_token_prediction"] or "none"),
    ]


def _parameter_rows(costs: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("parameters", _counted(costs["parameters"])),
        (
            "with multi-token prediction",
            _counted(costs["parameters_with_multi_token_prediction"]),
        ),
        ("active a token", _counted(costs["active_parameters"])),
        (
            "active without input embedding",
            _counted(costs["active_parameters_without_input_embedding"]),
        ),
    ]


def _flop_rows(costs: dict[str, Any]) -> list[tuple[str, str]]:
    at = f"FLOP a token at {costs['seq_len']:,}"
    return [
        (f"forward {at}", _giga(costs["forward_flops_per_token"])),
        (f"training {at}", _giga(costs["training_flops_per_token"])),
    ]


def _byte_rows(costs: dict[str, Any]) -> list[tuple[str, str]]:
    name = costs["dtype"]
    return [
        (f"KV cache a token, {name}", _bytes(costs["kv_cache_bytes_per_token"])),
        (f"KV cache at {costs['seq_len']:,} tokens", _bytes(costs["kv_cache_bytes"])),
        (f"SSM state a sequence, {costs['ssm_dtype']}", _bytes(costs["ssm_state_bytes"])),
        (f"conv state a sequence, {name}", _bytes(costs["conv_state_bytes"])),
        (f"checkpoint, {name}", _bytes(costs["checkpoint_bytes"])),
        ("checkpoint tensors", f"{costs['checkpoint_tensors']:,}"),
    ]


def _name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def _counted(count: int) -> str:
    """The whole number, and beside a large one its size in words."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count:,} ({count / size:.2f} {unit})"
    return f"{count:,}"


def _mega(flops: float) -> str:
    """In millions; three digits of a small model's."""
    return f"{flops / 1e6:,.1f}" if flops >= 1e7 else f"{flops / 1e6:.3g}"


def _giga(flops: float) -> str:
    unit, size = next(((u, s) for u, s in (("G", 1e9), ("M", 1e6)) if flops >= s), ("k", 1e3))
    return f"{flops / size:,.2f} {unit}"


def _bytes(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 1 << power:
            return f"{count / (1 << power):,.2f} {unit}"
    return f"{count} B"
