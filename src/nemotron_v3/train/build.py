"""The model of a run: loaded or fresh, adapted, spread over the processes."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn.parallel import DistributedDataParallel

from nemotron_v3.checkpoint import from_pretrained
from nemotron_v3.config import PRESETS, NemotronV3Config
from nemotron_v3.config.spelling import check_keys, read_mapping, settings_of
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.protocol import Trained
from nemotron_v3.parallel import Plan, parallelize
from nemotron_v3.train.batches import empty_batch
from nemotron_v3.train.memory import device_room, recomputed_blocks
from nemotron_v3.train.options import DTYPE_KEYS, LoraOptions, ModelOptions, TrainOptions
from nemotron_v3.train.processes import World


class Adapters(Protocol):
    """Who puts LoRA on a model and saves it: handed in, since this room knows no PEFT."""

    def add(self, model: NemotronV3ForCausalLM, options: LoraOptions) -> None:
        """Freeze the model and put adapters beside its weights."""

    def save(self, model: Trained, options: LoraOptions, folder: Path, base: str | None) -> None:
        """Write the adapters of a model, whose state dict holds whole tensors, as PEFT does."""


def read_model_config(options: ModelOptions, device: torch.device) -> NemotronV3Config:
    """The config of the model that is asked for, in the dtype that it is trained in.

    Raises:
        ValueError: neither a released model's name nor a config.json; fields that no config has.
    """
    if options.path is not None:
        config = NemotronV3Config.from_json(options.path)
        dtype = options.dtype and getattr(torch, options.dtype)
        return config.replace(dtype=dtype) if dtype else config
    changes = dict(options.config)
    if options.dtype is not None or not DTYPE_KEYS & changes.keys():
        default = "bfloat16" if device.type == "cuda" else "float32"
        changes["dtype"] = getattr(torch, options.dtype or default)
    if options.preset is None:
        return NemotronV3Config.from_dict(changes)
    changes = _fields(changes)
    if options.preset in PRESETS or not Path(options.preset).exists():
        return NemotronV3Config.preset(options.preset, **changes)
    return NemotronV3Config.from_json(options.preset).replace(**changes)


def _fields(told: Mapping[str, Any]) -> dict[str, Any]:
    """What keys of a config.json say, by the names of the config's fields."""
    spelled, length = settings_of(NemotronV3Config), "num_hidden_layers"
    check_keys(spelled, told, also={length})
    return read_mapping(spelled, told) | {n: told[n] for n in (length,) if n in told}


def build_model(
    options: TrainOptions, world: World, adapters: Adapters | None
) -> tuple[NemotronV3ForCausalLM, nn.Module]:
    """The model, and what is called in its place: itself, or DDP around it.

    Sharded, its weights are read or drawn by the first process alone, which sends each its part:
    they are those that one process has.

    Raises:
        ValueError: a plan that does not divide the processes or the model; on all of them.
    """
    plan = Plan(**asdict(options.plan))
    if options.parallel == "fsdp":
        plan = plan.over(world.size)
    sharded = world.size > 1 and options.parallel == "fsdp"
    if not sharded:
        model = _whole(options, world.device, world.device)
    elif world.first:
        model = _whole(options, torch.device("cpu"), world.device)
    else:
        with torch.device("meta"):
            model = NemotronV3ForCausalLM(read_model_config(options.model, world.device))
    if options.lora.rank:
        _adapt(model, options.lora, options.seed, adapters)
    if blocks := _recomputed(options, model, world):
        model.gradient_checkpointing_enable(blocks=blocks)
    if sharded:
        _shard(model, plan, world)
    if options.memory.compile:
        for block in model.model.layers:
            block.compile()
    if sharded or world.size == 1:
        return model, model
    return model, _copied(model, world)


def _whole(
    options: TrainOptions, place: torch.device, device: torch.device
) -> NemotronV3ForCausalLM:
    asked = options.model
    if asked.path is not None:
        dtype = asked.dtype and getattr(torch, asked.dtype)
        return from_pretrained(asked.path, dtype, place)
    torch.manual_seed(options.seed)
    with place:
        return NemotronV3ForCausalLM(read_model_config(asked, device))


def _adapt(
    model: NemotronV3ForCausalLM, options: LoraOptions, seed: int, adapters: Adapters | None
) -> None:
    if adapters is None:
        raise ValueError(
            "LoRA is put on by PEFT: run `nemotron-v3 train` with the extra [hf] installed, or "
            "hand in nemotron_v3.hf.lora"
        )
    torch.manual_seed(seed)
    adapters.add(model, options)


def _copied(model: NemotronV3ForCausalLM, world: World) -> DistributedDataParallel:
    """A copy in each process, whose gradients are summed in one order from the first step on.

    DDP lays out its buckets anew after its first backward pass, and where a gradient lies in a
    bucket decides in which order three processes or more add it up. A run that goes on would begin
    with the first layout again: so a pass without targets comes before all steps.
    """
    ids = [world.device] if world.device.type == "cuda" else None
    copied = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    nothing = empty_batch(world.device).arguments()
    copied.train()(**nothing, num_items_in_batch=1).loss.backward()
    copied.zero_grad()
    return copied


def _recomputed(
    options: TrainOptions, model: NemotronV3ForCausalLM, world: World
) -> tuple[int, ...]:
    """The blocks to recompute: the same ones on all processes, which gather weights together."""
    dtype, room = model.model.embeddings.weight.dtype, device_room(world.device)
    kernels = world.device.type == "cuda"
    blocks = recomputed_blocks(options, model.config, dtype, world.size, kernels, room)
    return tuple(world.told(blocks))


def _shard(model: NemotronV3ForCausalLM, plan: Plan, world: World) -> None:
    whole = model.state_dict() if world.first else {}
    if world.first:
        whole = {name: tensor.detach().clone() for name, tensor in whole.items()}
        model.to("meta")
    # Sums of gradients are made in fp32, whatever the weights are.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    parallelize(model, plan, mp_policy=policy, device_type=world.device.type)
    model.to_empty(device=world.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
