"""The end of a run: a checkpoint that everybody loads, or an adapter; read again, as a proof."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nemotron_v3.checkpoint import audit, save_pretrained
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.build import Adapters
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.processes import World
from nemotron_v3.train.tokenizer import save_tokenizer


def export(
    model: NemotronV3ForCausalLM,
    options: TrainOptions,
    world: World,
    adapters: Adapters | None,
    tokenizer: Any,
) -> None:
    """Write to the run's folder what was trained; every process has to call it.

    The whole model with its tokeniser, chat template and generation config; or, of LoRA, the
    adapters alone.

    Raises:
        OSError: the disk refuses; what stood there stays.
        CheckpointError: what is on the disk is not what was trained.
    """
    whole = _gathered(model, options, world)
    if world.first:
        if options.lora.rank:
            base = None if options.model.path is None else str(options.model.path.resolve())
            adapters.save(whole, options.lora, options.out, base)
        else:
            if options.model.path is None:
                save_tokenizer(tokenizer, options)
            save_pretrained(whole, options.out)
            audit(whole, options.out)
    world.wait()


def _gathered(
    model: NemotronV3ForCausalLM, options: TrainOptions, world: World
) -> NemotronV3ForCausalLM:
    """The model with whole tensors on the first process: itself, where it is not sharded."""
    if world.size == 1 or options.parallel == "ddp":
        return model
    gather = StateDictOptions(
        full_state_dict=True, cpu_offload=True, ignore_frozen_params=bool(options.lora.rank)
    )
    state = get_model_state_dict(model, options=gather)
    if not world.first:
        return model
    if options.lora.rank:
        return Gathered(model, state)
    with torch.device("meta"):
        whole = NemotronV3ForCausalLM(model.config, model.model.backend)
    whole.load_state_dict(state, assign=True)
    for name in ("mtp", "checkpoint_origin", "generation_config"):
        setattr(whole, name, getattr(model, name))
    return whole


class Gathered:
    """A sharded model whose trained tensors were gathered, for who reads its state dict."""

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor]):
        self.config, self._model, self._state = model.config, model, state

    def state_dict(self) -> Mapping[str, Tensor]:
        return self._state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
