"""Models whose blocks have sizes of their own ("Puzzle"): one entry a block.

A file says so in `block_configs`, an object a block with its `block_type` and the sizes that are
its own (and in `mtp_block_configs` of multi-token prediction), or in a list of `intermediate_size`,
one for each MLP block. What an entry does not say is the model's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemotron_v3.config import values
from nemotron_v3.config.blocks import canonical_block_type

_COUNT = values.whole(1)
_MOE = {
    "n_routed_experts": _COUNT,
    "num_experts_per_tok": _COUNT,
    "moe_intermediate_size": _COUNT,
    "moe_shared_expert_intermediate_size": _COUNT,
    "moe_latent_size": values.optional(_COUNT),
    "n_group": _COUNT,
    "topk_group": _COUNT,
    "routed_scaling_factor": values.number(),
}
SIZES: dict[str, dict[str, values.Codec[Any, Any]]] = {
    "moe": _MOE,
    "mlp": {"intermediate_size": _COUNT},
    "mamba": {},
    "attention": {},
}
"""The settings that a block may have for itself, by block type, and how each is read."""

_TYPE = "block_type"


@dataclass(frozen=True)
class BlockConfig:
    """A block's type, and its own `sizes` as pairs of a setting's name and value, in order.

    `others` are model-wide settings repeated in the entry; they must equal the model's.
    """

    block_type: str
    sizes: tuple[tuple[str, Any], ...] = ()
    others: tuple[tuple[str, Any], ...] = field(default=(), hash=False)


def _read(key: str, value: Any) -> tuple[BlockConfig, ...]:
    if not isinstance(value, list | tuple) or len(value) > values.MOST_BLOCKS:
        raise ValueError(f"{key} is {str(value)[:200]}: give a list with an entry a block")
    return tuple(_read_entry(f"{key}[{i}]", entry) for i, entry in enumerate(value))


def _read_entry(where: str, entry: Any) -> BlockConfig:
    if isinstance(entry, BlockConfig):
        return entry
    given = dict(entry) if isinstance(entry, Mapping) else dict(getattr(entry, "__dict__", {}))
    if _TYPE not in given:
        raise ValueError(f"{where} is {str(entry)[:200]}: give its {_TYPE} and sizes of its own")
    try:
        block = canonical_block_type(given.pop(_TYPE))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    known = SIZES[block]
    # Writers that use one object for all types write null for sizes that a block does not have.
    for name in {name for sizes in SIZES.values() for name in sizes}:
        if name in given and given[name] is None and not (name in known and known[name].optional):
            del given[name]
    sizes = {
        name: codec.read(f"{where}.{name}", given[name])
        for name, codec in known.items()
        if name in given
    }
    others = {name: value for name, value in given.items() if name not in known}
    return BlockConfig(block, tuple(sizes.items()), tuple(others.items()))


def _write(value: tuple[BlockConfig, ...], was: Any, key: str) -> list[dict[str, Any]]:
    return [{_TYPE: b.block_type} | dict(b.sizes) | dict(b.others) for b in value]


entries = values.Codec(_read, _write)


def of_mlp_widths(blocks: Sequence[str], widths: Sequence[Any]) -> tuple[BlockConfig, ...]:
    """The entries of blocks whose MLPs have `widths`, one after the other.

    Raises `ValueError` for another number of them.
    """
    if blocks.count("mlp") != len(widths):
        raise ValueError(
            f"intermediate_size lists {len(widths)} widths for {blocks.count('mlp')} mlp blocks: "
            "give one for each, or one number for all"
        )
    rest = iter(widths)
    read = _COUNT.read
    return tuple(
        BlockConfig(block, (("intermediate_size", read("intermediate_size", next(rest))),))
        if block == "mlp"
        else BlockConfig(block)
        for block in blocks
    )


def mlp_widths(blocks: Sequence[BlockConfig], width: int) -> list[int] | None:
    """The widths of the MLPs among `blocks`; None where other blocks have sizes of their own."""
    if any(block.sizes for block in blocks if block.block_type != "mlp"):
        return None
    return [
        dict(block.sizes).get("intermediate_size", width)
        for block in blocks
        if block.block_type == "mlp"
    ]


def check_entries(
    key: str, entries: Sequence[BlockConfig], blocks: Sequence[str], config: object
) -> None:
    """Raise `ValueError` unless there is an entry a block, of its type, with no other settings than
    those that a block may have for itself, or that are the model's own."""
    if len(entries) != len(blocks):
        raise ValueError(
            f"{key} has {len(entries)} entries for {len(blocks)} blocks: give one for each"
        )
    for i, (entry, block) in enumerate(zip(entries, blocks, strict=True)):
        if entry.block_type != block:
            raise ValueError(
                f"{key}[{i}] is a {entry.block_type} block, the model's blocks say {block}: "
                "correct one of them"
            )
        for name, value in entry.others:
            if getattr(config, name, None) != value:
                offered = ", ".join(SIZES[block]) or "no setting"
                raise ValueError(
                    f"{key}[{i}].{name} is {str(value)[:100]}, which a {block} block cannot have "
                    f"for itself: that is {offered}"
                )
