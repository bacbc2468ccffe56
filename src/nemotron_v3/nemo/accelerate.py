"""`accelerate` and `undo`: another computation for the modules of an AutoModel model.

A module's class is exchanged for a subclass of it with another `forward`; nothing else about it is
touched. Parameters, buffers, children, hooks, dtypes and names stay as they are, and with them what
AutoModel's recipes, checkpointer, parallelizer and LoRA look for.
"""

from typing import Any

from torch import nn

# Imported so that their classes are in the table.
from nemotron_v3.nemo import layers as _layers  # noqa: F401
from nemotron_v3.nemo import model as _model  # noqa: F401
from nemotron_v3.nemo import moe as _moe  # noqa: F401
from nemotron_v3.nemo.classes import (
    MIXTURE,
    SETTINGS,
    SHARED,
    Accelerated,
    accelerated_class,
    computes_itself,
    full_name,
    is_theirs,
    plain_class,
    their_name,
)
from nemotron_v3.nemo.shared_tokens import shares_attention
from nemotron_v3.nemo.versions import check_version
from nemotron_v3.ops.registry import IMPLS


def accelerate(model: nn.Module, *, impl: str = "auto") -> nn.Module:
    """Let this package compute a Nemotron-H model of NeMo AutoModel, in place.

    Call it before the model is sharded; before or after its LoRA. `enable` does it for every model
    that is built from then on, which a recipe needs.

    Args:
        model: AutoModel's `NemotronHForCausalLM`, a part of one, or a module that holds one.
        impl: which form of each op runs, see `nemotron_v3.ops`.

    Returns:
        `model` itself.

    Raises:
        ImportError: a NeMo AutoModel outside the supported versions.
        TypeError: nothing of its Nemotron-H in the model, classes that compute something of their
            own, or a model that is sharded already.
        ValueError: a model that is accelerated already, an unknown form, a `forward` that something
            else has replaced. The model is as it was, in every case.
    """
    check_version()
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not offered: one of {', '.join(map(repr, IMPLS))}")
    found = _layers_of(model)
    if any(isinstance(module, Accelerated) for module in found):
        raise ValueError(
            "the model is accelerated already: call nemotron_v3.nemo.undo(model) first to change "
            "its impl"
        )
    kinds = [accelerated_class(type(module)) for module in found]
    for module in found:
        _check_forward(module)
    for module, kind in zip(found, kinds, strict=True):
        vars(module)[SETTINGS] = impl
        module.__class__ = kind
    return model


def undo(model: nn.Module) -> nn.Module:
    """Give an accelerated model back to NeMo AutoModel.

    Args:
        model: what `accelerate` took, or a model that was built after `enable`.

    Returns:
        `model` itself, computing bit for bit what AutoModel does.

    Raises:
        TypeError: no module.
        ValueError: a model that is not accelerated, or that has been sharded since; attention that
            shares its tokens, which AutoModel's own would not.
    """
    mine: list[nn.Module] = [m for m in _checked(model).modules() if isinstance(m, Accelerated)]
    if not mine:
        raise ValueError("the model is not accelerated: there is nothing to undo")
    if any(map(shares_attention, mine)):
        raise ValueError(
            "setup_cp_attention has been called on the model: AutoModel's own attention would "
            "compute with this process's part of the tokens alone; undo before it is parallelized"
        )
    kinds = [plain_class(type(module)) for module in mine]
    for module, kind in zip(mine, kinds, strict=True):
        module.__class__ = kind
        vars(module).pop(SETTINGS)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been through a model, or through the one it holds."""
    return any(isinstance(module, Accelerated) for module in model.modules())


def _layers_of(model: Any) -> list[nn.Module]:
    """The modules whose classes are to change, in the order of the model.

    Layers that other kinds of models have too are taken inside a Nemotron-H block alone, or where
    they are what was given.
    """
    outer = [m for m in _checked(model).modules() if is_theirs(m) and not _is_shared(m)]
    if _is_shared(model) or full_name(type(model)) == MIXTURE:
        outer.append(model)
    inside = {id(part) for module in outer for part in module.modules()}
    found = [
        module
        for module in model.modules()
        if is_theirs(module)
        and id(module) in inside
        # Experts that LoRA or another dispatcher has put there compute themselves: they stay.
        and not (_is_shared(module) and computes_itself(type(module)))
    ]
    if not found:
        raise TypeError(
            f"nothing of NeMo AutoModel's Nemotron-H in a {full_name(type(model))}: give its "
            "NemotronHForCausalLM (a model that was loaded with force_hf=True is transformers' "
            "own: nemotron_v3.hf.accelerate)"
        )
    return found


def _is_shared(module: nn.Module) -> bool:
    return their_name(type(module)) in SHARED


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {full_name(type(model))} is no model: give a NemotronHForCausalLM")
    return model


def _check_forward(module: nn.Module) -> None:
    """Refuse a forward that was put on the module itself, which would go on calling the old one."""
    if "forward" in vars(module) and not _is_shared(module):
        raise ValueError(
            f"the forward of a {full_name(type(module))} has been replaced "
            f"({vars(module)['forward']!r}): accelerate the model before it is patched"
        )
