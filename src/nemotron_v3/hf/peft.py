"""PEFT's LoRA on accelerated models, out_proj included.

By a model's type PEFT refuses adapters of a Mamba model's `out_proj`. An accelerated model calls
every projection as a module, and `exemption` lets PEFT know, whoever calls it: `get_peft_model`,
`PeftModel.add_adapter`, a trainer. What is here adds checks that PEFT does not make.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from nemotron_v3.adapters import LoraTargets, coverage, lora_targets
from nemotron_v3.hf.accelerate import is_accelerated
from nemotron_v3.hf.adapter_files import as_it_was, fitting, read_config
from nemotron_v3.hf.exemption import exempt_if_loaded
from nemotron_v3.model.model import NemotronV3Model

exempt_if_loaded()  # for models that were accelerated before PEFT was imported


def lora_config(
    model: nn.Module, groups: Sequence[str] | None = None, *, r: int = 16, **settings: Any
) -> LoraConfig:
    """PEFT's config of an adapter of the preset `groups`.

    Args:
        model: the model that it is for.
        groups: names in `nemotron_v3.adapters.GROUPS`; None is all but the routed experts, the
            router and the head.
        r: rank.
        **settings: any other of `peft.LoraConfig`; `lora_alpha` is 2 r where it is not given.

    Raises:
        ValueError: a group that is not there.
    """
    targets = lora_targets(model, groups)
    settings = {"lora_alpha": 2 * r, "task_type": "CAUSAL_LM"} | settings
    return LoraConfig(
        r=r,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        **settings,
    )


def add_lora(model: nn.Module, config: LoraConfig | None = None, **kwargs: Any) -> PeftModel:
    """`peft.get_peft_model` for an accelerated model.

    Args:
        model: what `nemotron_v3.hf.accelerate` returned, or a model built after `register()`.
        config: PEFT's; None is `lora_config(model)`.
        **kwargs: `get_peft_model`'s.

    Returns:
        The `PeftModel`, to train, save and hand on as any other.

    Raises:
        ValueError: a target that matches nothing (with the nearest names), a model that is not
            accelerated. The model is as it was.
    """
    config = lora_config(model) if config is None else config
    _check_accelerated(model)
    _check_targets(model, config)
    return get_peft_model(model, config, **kwargs)


def load_lora(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> PeftModel:
    """`peft.PeftModel.from_pretrained` for an accelerated model, which loads all of an adapter or
    nothing.

    Tensors may be called by other names for the same: `backbone.` for `model.`, with what
    torch.compile, DDP and FSDP put in front, without PEFT's own prefix.

    Args:
        model: as for `add_lora`, without adapters.
        path: what `PeftModel.save_pretrained` wrote.
        **kwargs: `from_pretrained`'s, as `is_trainable=True` to train on.

    Raises:
        ValueError: a model that is not accelerated, or has adapters; a config whose fields cannot
            be; tensors that match nothing, are missing, named twice, of another shape or not
            finite; what PEFT refuses. The model is as it was.
    """
    _check_accelerated(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"a {type(model).__name__} that has adapters: call its load_adapter(path, name) for "
            "another one"
        )
    config = kwargs.pop("config", None) or read_config(path, kwargs)
    with fitting(model, path, config, kwargs) as directory, as_it_was(model, on_error_only=True):
        if directory != os.fspath(path):
            kwargs.pop("subfolder", None)
        return PeftModel.from_pretrained(model, directory, config=config, **kwargs)


@contextlib.contextmanager
def projections_as_modules(model: nn.Module) -> Iterator[None]:
    """Once needed around calls of PEFT's own; an accelerated model needs it no more.

    Raises:
        ValueError: a model that is not accelerated, for which PEFT is right to refuse `out_proj`.
    """
    _check_accelerated(model)
    yield


def _check_accelerated(model: nn.Module) -> None:
    exempt_if_loaded()
    if any(isinstance(module, NemotronV3Model) for module in model.modules()):
        raise ValueError(
            f"a {type(model).__name__} is a model of nemotron_v3 itself: call "
            "peft.get_peft_model(model, peft.LoraConfig(target_modules=list(nemotron_v3.adapters."
            "lora_targets(model).modules))), or, for a Trainer, load the checkpoint with "
            "AutoModelForCausalLM.from_pretrained(path), accelerate that, then add_lora"
        )
    if not is_accelerated(model):
        raise ValueError(
            f"a {type(model).__name__} that is not accelerated: call nemotron_v3.hf.accelerate on "
            "it first (transformers' kernels read out_proj's weight and pass its adapter by)"
        )


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    modules = config.target_modules
    if modules == "all-linear":
        return
    parameters = tuple(config.target_parameters or ())
    # A pattern is one string, which coverage takes as PEFT does.
    names = (
        cast("tuple[str, ...]", modules)
        if isinstance(modules, str)
        else tuple(sorted(modules or ()))
    )
    coverage(model, LoraTargets(names, parameters))
