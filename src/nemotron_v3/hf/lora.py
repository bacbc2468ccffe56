"""LoRA on a model of this package: PEFT's beside projections, grouped updates beside experts.

PEFT adapts a stack of experts by adding `B A` to it at every call. Here each expert's update is
computed beside the stack (`experts.add_low_rank`), and what is saved is one adapter in PEFT's
format all the same: PEFT loads it, `nemotron-v3 convert` merges it.

Letters: E experts, r rank, I inputs and O outputs of an expert's matrix.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from nemotron_v3.adapters import LoraTargets, lora_targets
from nemotron_v3.checkpoint import CheckpointError
from nemotron_v3.checkpoint.reader import Shard
from nemotron_v3.checkpoint.writer import Piece, same_bits, write_safetensors
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.hf.lora_linear import fuse_lora_
from nemotron_v3.layers.moe.experts import NemotronV3Experts
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.protocol import Trained

NAME = "default"  # PEFT's name of the first adapter
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_STACKS = ("experts.up_proj", "experts.down_proj")
_PEFT = re.compile(rf"(.+\.lora_(?:embedding_)?[AB])\.{NAME}(\.weight)?")
_GROUPED = re.compile(r"(.+\.experts)\.low_rank\.(up|down)_([ab])")


class Asked(Protocol):
    """The options of an adapter: see `nemotron_v3.train.options.LoraOptions`."""

    @property
    def rank(self) -> int: ...

    @property
    def alpha(self) -> float | None: ...

    @property
    def groups(self) -> tuple[str, ...]: ...

    @property
    def dropout(self) -> float: ...


def add(model: NemotronV3ForCausalLM, options: Asked) -> None:
    """Freeze the model and put adapters of its dtype beside the weights of the groups.

    Raises:
        ValueError: a group that is not there, or that the model has nothing of.
    """
    targets = lora_targets(model, options.groups or None)
    beside = LoraTargets(targets.modules, tuple(p for p in targets.parameters if p not in _STACKS))
    model.requires_grad_(False)
    if beside.modules or beside.parameters:
        inject_adapter_in_model(_config(options, beside), model, NAME)
        fuse_lora_(model)
    if set(targets.parameters) & set(_STACKS):
        for module in model.modules():
            if isinstance(module, NemotronV3Experts):
                module.add_low_rank(options.rank, alpha=_alpha(options))


def save(model: Trained, options: Asked, folder: Path, base: str | None) -> None:
    """Write the adapters of a model to `folder` in PEFT's format, and read them again.

    The config is written last: without it, nobody takes the folder for an adapter.

    Args:
        model: whose state dict holds whole tensors.
        options: it was adapted with.
        folder: that exists.
        base: where the model without adapters lies; None: not recorded.

    Raises:
        CheckpointError: what is on the disk is not what was trained.
        OSError: the disk refuses; what stood there stays.
    """
    targets = lora_targets(model.config, options.groups or None)
    tensors = dict(_as_peft_names_them(model.state_dict()))
    pieces = [Piece(name, t, t.dtype) for name, t in sorted(tensors.items())]
    with atomic_file(folder / WEIGHTS) as path:
        write_safetensors(path, pieces, {"format": "pt"})
        written = Shard(path)
        for name, tensor in tensors.items():
            if not same_bits(written.tensor(name), tensor.cpu()):
                raise CheckpointError(f"{name} on the disk is not what was trained")
    config = _config(options, targets)
    config.base_model_name_or_path, config.inference_mode = base, True
    with atomic_file(folder / CONFIG) as path:
        path.write_text(_text(config), encoding="utf-8")


def _config(options: Asked, targets: LoraTargets) -> LoraConfig:
    return LoraConfig(
        r=options.rank,
        lora_alpha=_alpha(options),
        lora_dropout=options.dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        task_type="CAUSAL_LM",
    )


def _alpha(options: Asked) -> float:
    return 2 * options.rank if options.alpha is None else options.alpha


def _text(config: LoraConfig) -> str:
    """JSON as PEFT writes it: sets as sorted lists."""

    def plain(value: object) -> object:
        return sorted(value) if isinstance(value, set) else str(value)

    return json.dumps(config.to_dict(), indent=2, sort_keys=True, default=plain) + "\n"


def _as_peft_names_them(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the adapters among a model's.

    PEFT wraps a stack's module once for each of its matrices: `up_proj`, the first, is inside.
    """
    for name, tensor in state.items():
        if match := _PEFT.fullmatch(name):
            yield f"base_model.model.{match[1]}{match[2] or ''}", tensor.detach()
        elif match := _GROUPED.fullmatch(name):
            inside = ".base_layer" if match[2] == "up" else ""
            half = match[3].upper()
            flat = _side_by_side(tensor.detach(), half)
            yield f"base_model.model.{match[1]}{inside}.lora_{half}.weight", flat


def _side_by_side(tensor: Tensor, half: str) -> Tensor:
    """A `[E, r, I]` as `[E r, I]`, expert by expert; B `[E, O, r]` as `[O, r E]`, rank by rank."""
    if half == "A":
        return tensor.reshape(-1, tensor.shape[2])
    return tensor.permute(1, 2, 0).reshape(tensor.shape[1], -1)
