"""PEFT's LoRA on accelerated models, out_proj included.

By a model's type PEFT refuses adapters of a Mamba model's `out_proj`, since the CUDA kernels that
transformers calls read its weight and would pass the adapter by. An accelerated model calls every
projection as a module, so here they are let through; nothing of PEFT is changed.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from nemotron_v3.adapters import LoraTargets, coverage, lora_targets
from nemotron_v3.hf.accelerate import is_accelerated
from nemotron_v3.model.model import NemotronV3Model


def lora_config(
    model: nn.Module, groups: Sequence[str] | None = None, *, r: int = 16, **settings: Any
) -> LoraConfig:
    """PEFT's config of an adapter of the preset `groups`.

    Args:
        model: the model that it is for.
        groups: names in `nemotron_v3.adapters.GROUPS`; None is all but the routed experts, the
            router and the head.
        r: rank.
        **settings: any other of `peft.LoraConfig`; `lora_alpha` is 2 r where it is not told.

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
    with projections_as_modules(model):
        _check_targets(model, config)
        return get_peft_model(model, config, **kwargs)


def load_lora(model: nn.Module, path: str | os.PathLike, **kwargs: Any) -> PeftModel:
    """`peft.PeftModel.from_pretrained` for an accelerated model.

    Args:
        model: as for `add_lora`.
        path: what `PeftModel.save_pretrained` wrote.
        **kwargs: `from_pretrained`'s, as `is_trainable=True` to train on.

    Raises:
        ValueError: a model that is not accelerated, and what PEFT refuses.
    """
    with projections_as_modules(model):
        return PeftModel.from_pretrained(model, path, **kwargs)


@contextlib.contextmanager
def projections_as_modules(model: nn.Module) -> Iterator[None]:
    """While it is open, PEFT adds and loads adapters of `out_proj` too: for what has no function
    here, such as `PeftModel.load_adapter`.

    Raises:
        ValueError: a model that is not accelerated, for which PEFT is right to refuse them.
    """
    if any(isinstance(module, NemotronV3Model) for module in model.modules()):
        raise ValueError(
            f"a {type(model).__name__} is a model of nemotron_v3 itself: call "
            "peft.get_peft_model(model, peft.LoraConfig(target_modules=[...])) with the names of "
            "nemotron_v3.adapters.lora_targets(model), or, for a Trainer, load the checkpoint with "
            "AutoModelForCausalLM.from_pretrained(path), accelerate that, then add_lora"
        )
    if not is_accelerated(model):
        raise ValueError(
            f"a {type(model).__name__} that is not accelerated: call nemotron_v3.hf.accelerate on "
            "it first (transformers' kernels read out_proj's weight and pass its adapter by)"
        )
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    configs = [c for c in configs.values() if getattr(c, "model_type", None) == "nemotron_h"]
    # PEFT looks the type up; on the object it hides the one of its class.
    for config in configs:
        config.model_type = "nemotron_h, every projection called as a module"
    try:
        yield
    finally:
        for config in configs:
            del config.model_type


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    modules = config.target_modules
    if modules == "all-linear":
        return
    modules = modules if isinstance(modules, str) else sorted(modules or ())
    coverage(model, LoraTargets(modules, tuple(config.target_parameters or ())))
