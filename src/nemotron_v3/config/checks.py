"""Contradictions between the settings of a model, each with the way out."""

import copy
from typing import TypeVar

from nemotron_v3.config.blocks import to_pattern
from nemotron_v3.config.puzzle import BlockConfig, check_entries
from nemotron_v3.config.settings import ModelSettings
from nemotron_v3.config.spelling import put

Settings = TypeVar("Settings", bound=ModelSettings)

_EXPERT_SIZES = (
    "n_routed_experts",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
)


def check(config: ModelSettings, num_hidden_layers: int | None, untyped: bool) -> None:
    """Raise `ValueError` where settings of `config` contradict each other.

    `num_hidden_layers` is the depth that was given beside the blocks (None: it was not given).
    `untyped`: a foreign object may name no blocks (a layer built alone needs none) and no experts
    (a `MoEConfig` handed in beside it has them).
    """
    _check_depth(config, num_hidden_layers, untyped)
    _check_divides(
        "num_attention_heads",
        config.num_attention_heads,
        "num_key_value_heads",
        config.num_key_value_heads,
    )
    _check_divides("mamba_num_heads", config.mamba_num_heads, "n_groups", config.n_groups)
    if config.time_step_min > config.time_step_max:
        raise ValueError(
            f"time_step_min {config.time_step_min} is above time_step_max {config.time_step_max}: "
            "swap or correct them"
        )
    for one in sized(config, untyped):
        if one.has_experts and not untyped:
            check_expert_sizes(one)
        if one.n_routed_experts:
            _check_experts(one)


def sized(config: ModelSettings, untyped: bool) -> list[ModelSettings]:
    """The config once for all blocks, or for each that has experts of its own."""
    entries = (("block_configs", config.layers_block_type),)
    if config.num_nextn_predict_layers:
        entries += (("mtp_block_configs", config.mtp_layers_block_type),)
    found: list[ModelSettings] = []
    alike = not config.block_configs
    for key, blocks in entries:
        own = getattr(config, key)
        if own:
            if not untyped:
                check_entries(key, own, blocks, config)
            found += [with_sizes(config, e) for e in own if e.block_type == "moe"]
        else:
            alike = alike or "moe" in blocks
    return [config, *found] if alike else found


def with_sizes(config: Settings, entry: BlockConfig) -> Settings:
    """`config`, with the sizes of one block for all."""
    one = copy.copy(config)
    for name, value in (*entry.sizes, ("block_configs", ()), ("mtp_block_configs", ())):
        put(one, name, value)
    return one


def _check_depth(config: ModelSettings, depth: int | None, untyped: bool) -> None:
    blocks = config.layers_block_type
    if not blocks and not untyped:
        raise ValueError(
            "layers_block_type is empty: name the blocks, for instance layers_block_type='MEM*-'"
        )
    if depth is None or (untyped and not blocks):
        return
    if depth != len(blocks):
        raise ValueError(
            f"num_hidden_layers {depth} contradicts the {len(blocks)} blocks of "
            f"{to_pattern(blocks)!r}: correct one, or leave num_hidden_layers out"
        )


def _check_divides(name: str, value: int, by_name: str, by: int) -> None:
    if value % by:
        raise ValueError(f"{name} {value} is not a multiple of {by_name} {by}: change one of them")


def check_expert_sizes(config: ModelSettings) -> None:
    """Raise `ValueError` where a size is missing without which no moe block can be built."""
    missing = [name for name in _EXPERT_SIZES if getattr(config, name) == 0]
    if missing:
        raise ValueError(
            f"moe blocks need {', '.join(missing)}: give a number of at least 1 for each "
            "(or, to a single block, a moe_config)"
        )


def _check_experts(config: ModelSettings) -> None:
    if config.n_shared_experts != 1:
        raise ValueError(
            f"n_shared_experts is {config.n_shared_experts}: only 1 is supported, its width is "
            "moe_shared_expert_intermediate_size"
        )
    check_routing(
        config,
        experts="n_routed_experts",
        top_k="num_experts_per_tok",
        groups="n_group",
        top_groups="topk_group",
    )


def check_routing(
    config: object, *, experts: str, top_k: str, groups: str, top_groups: str
) -> None:
    """Raise `ValueError` if a router's fields contradict each other; arguments are their names."""
    n_experts, k = getattr(config, experts), getattr(config, top_k)
    n_groups, k_groups = getattr(config, groups), getattr(config, top_groups)
    _check_divides(experts, n_experts, groups, n_groups)
    if k_groups > n_groups:
        raise ValueError(
            f"{top_groups} {k_groups} is above {groups} {n_groups}: choose at most all"
        )
    reachable = n_experts // n_groups * k_groups
    if k > reachable:
        raise ValueError(
            f"{top_k} {k} is above the {reachable} experts to choose from ({experts} {n_experts}, "
            f"{top_groups} {k_groups} of {groups} {n_groups}): lower it or offer more experts"
        )
