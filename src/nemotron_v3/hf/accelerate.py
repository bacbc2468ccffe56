"""`accelerate` and `undo`: another computation for the modules of a transformers model.

A module's class is exchanged for the accelerated one of the same name; nothing else about it is
touched. Parameters, buffers, children, hooks, dtypes and names stay as they are, and with them
state dicts, optimisers, adapters and device maps.
"""

from typing import Any

from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.config import BackendConfig
from nemotron_v3.hf.register import register, unregister
from nemotron_v3.hf.settings import SETTINGS, Accelerated
from nemotron_v3.hf.swap import give_back, swap_in
from nemotron_v3.hf.versions import check_version


def accelerate(
    model: nn.Module | None = None,
    *,
    everything: bool = False,
    backend: BackendConfig | None = None,
    loss: str = "logits",
) -> nn.Module | None:
    """Let this package compute a transformers Nemotron-H model, in place.

    Call it before the model is sharded (FSDP) or handed to `Accelerator.prepare` or a `Trainer`;
    before or after adapters are added. It acts on this model alone: a reference, teacher or reward
    model that a trainer builds itself is transformers' own, unless `everything` is asked for.

    Args:
        model: a transformers `NemotronHForCausalLM` or `NemotronHModel`, or a module that holds
            exactly one, such as a `PeftModel` or a classifier. May be left out with `everything`.
        everything: also every Nemotron-H model of transformers that this process builds from now
            on, whoever builds it: `nemotron_v3.hf.register`.
        backend: which form of each op runs: `impl`, `attn` (`"sdpa"`, `"flex"`) and `rms_norm`
            (`"auto"`, `"torch"`) of a `BackendConfig`; None is the default one.
        loss: `"logits"` always returns logits, as transformers does; `"linear"` computes the
            training loss from some tokens' logits at a time and returns none with it. Of a
            language model alone.

    Returns:
        `model` itself.

    Raises:
        ImportError: a transformers outside the supported versions.
        TypeError: no Nemotron-H model of transformers in it, more than one, or one with classes
            that compute something of their own.
        ValueError: a model that is accelerated already, a config or option that is not offered, a
            `forward` that something else has replaced. The model is as it was, in every case.
    """
    check_version()
    if model is not None:
        swap_in(_find(model), backend, loss)
    elif not everything:
        raise TypeError("no model to accelerate: give one, or everything=True")
    if everything:
        register(backend=backend, loss=loss)
    return model


def undo(model: nn.Module | None = None, *, everything: bool = False) -> nn.Module | None:
    """Give an accelerated model back to transformers.

    Args:
        model: what `accelerate` took, or a model that was loaded accelerated.
        everything: let transformers' models be built as its own from now on
            (`nemotron_v3.hf.unregister`); models that were built before stay as they are.

    Returns:
        `model` itself, computing bit for bit what it did before.

    Raises:
        TypeError: no Nemotron-H model of transformers in it, or more than one.
        ValueError: a model that is not accelerated, or that has been sharded since.
    """
    if model is not None:
        give_back(_find(model))
    elif not everything:
        raise TypeError("no model to give back: give one, or everything=True")
    if everything:
        unregister()
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been through a model, or through the one it holds."""
    return any(
        isinstance(module, Accelerated)
        and isinstance(module, theirs.NemotronHModel)
        and SETTINGS in vars(module)
        for module in model.modules()
    )


def _find(model: Any) -> theirs.NemotronHForCausalLM | theirs.NemotronHModel:
    """The one language model of transformers in a module, or the one backbone without its head."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no model: give a NemotronHForCausalLM")
    heads = [m for m in model.modules() if isinstance(m, theirs.NemotronHForCausalLM)]
    headed = {id(part) for head in heads for part in head.modules()}
    bare = [
        m for m in model.modules() if isinstance(m, theirs.NemotronHModel) and id(m) not in headed
    ]
    found = heads + bare
    if len(found) == 1:
        return found[0]
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if not found:
        raise TypeError(
            f"no NemotronHForCausalLM or NemotronHModel of transformers in a {kind}: load a "
            "Nemotron-H checkpoint with AutoModelForCausalLM.from_pretrained(path), without "
            "trust_remote_code"
        )
    raise TypeError(f"{len(found)} language models in a {kind}: give one of them")
