"""The end of a run: a checkpoint that everybody loads, or an adapter; read again, as a proof."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nemotron_v3.checkpoint import audit, save_pretrained
from nemotron_v3.checkpoint.names import CheckpointOrigin
from nemotron_v3.checkpoint.side_files import OF_WEIGHTS, with_templates
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.data.tokenizer import FILE
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.build import Adapters
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.processes import World
from nemotron_v3.train.tokenizer import files_of, trained_templates


def export(
    model: NemotronV3ForCausalLM,
    options: TrainOptions,
    world: World,
    adapters: Adapters | None,
    tokenizer: Any,
) -> None:
    """Write to the run's folder what was trained; every process has to call it.

    The whole model with the tokeniser and chat template that it was trained with, and the
    checkpoint's generation config; or, of LoRA, the adapters with the template where it is not
    the base's.

    Raises:
        ValueError: LoRA, and nobody who saves adapters.
        OSError: the disk refuses; what stood there stays.
        CheckpointError: what is on the disk is not what was trained.
    """
    state = _gathered(model, options, world)
    if world.first:
        if options.lora.rank:
            if adapters is None:
                raise ValueError(f"lora.rank is {options.lora.rank}, and nobody saves adapters")
            base = None if options.model.path is None else str(options.model.path.resolve())
            trained = model if state is None else Gathered(model.config, state)
            _write(trained_templates(tokenizer, options), options.out)
            adapters.save(trained, options.lora, options.out, base)
        else:
            files = files_of(tokenizer, options)
            whole = model if state is None else _whole(model, state)
            if whole.checkpoint_origin is None:
                _write(files, options.out)
            else:
                whole.checkpoint_origin = _with_files(whole.checkpoint_origin, files)
            save_pretrained(whole, options.out)
            audit(whole, options.out)
    world.wait()


def _gathered(
    model: NemotronV3ForCausalLM, options: TrainOptions, world: World
) -> dict[str, Tensor] | None:
    """The whole tensors of a sharded model, on the first process; None where it is not sharded."""
    if world.size == 1 or options.parallel == "ddp":
        return None
    gather = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(options.lora.rank)
    )
    # torch's type allows for modules with a state of another kind, which this model has none of.
    return cast(dict[str, Tensor], get_model_state_dict(model, options=gather))


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_file(folder / name) as path:
            path.write_bytes(raw)


def _with_files(origin: CheckpointOrigin, files: Mapping[str, bytes]) -> CheckpointOrigin:
    """The origin with a tokenizer's files in the place of its own, or those of a chat template."""
    own = origin.side_files.items()
    kept = {name: raw for name, raw in own if name in OF_WEIGHTS or FILE not in files}
    new = {name: raw for name, raw in files.items() if name not in OF_WEIGHTS}
    if FILE in files:
        return replace(origin, side_files=kept | new)
    return replace(origin, side_files=with_templates(kept, new))


def _whole(model: NemotronV3ForCausalLM, state: Mapping[str, Tensor]) -> NemotronV3ForCausalLM:
    """A model that is not sharded, with the tensors that were gathered of one that is."""
    with torch.device("meta"):
        whole = NemotronV3ForCausalLM(model.config, model.model.backend)
    whole.load_state_dict(state, assign=True)
    for name in ("mtp", "checkpoint_origin", "generation_config"):
        setattr(whole, name, getattr(model, name))
    return whole


@dataclass
class Gathered:
    """The trained tensors of a sharded model, gathered for who reads its state dict."""

    config: NemotronV3Config
    state: Mapping[str, Tensor]

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.state
