"""`accelerate` and `undo`: another computation for the modules of a transformers model.

A module's class is exchanged for the accelerated one of the same name; nothing else about it is
touched. Parameters, buffers, children, hooks, dtypes and names stay as they are, and with them
state dicts, optimisers, adapters and device maps.
"""

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.hf.classes import accelerated_class, is_theirs, plain_class
from nemotron_v3.hf.exemption import exempt_if_loaded
from nemotron_v3.hf.layers import SETTINGS, Accelerated, Settings
from nemotron_v3.hf.versions import check_version

LOSSES = ("logits", "linear")


@dataclass
class Options:
    """Of models that are built accelerated."""

    backend: BackendConfig = field(default_factory=BackendConfig)
    loss: str = "logits"


AS_BUILT = Options()  # `register` changes it


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
    from nemotron_v3.hf.register import register

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
    from nemotron_v3.hf.register import unregister

    if model is not None:
        _give_back(_find(model))
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


def check_options(backend: Any, loss: Any) -> BackendConfig:
    """The typed backend; raises ValueError for an option that is not offered."""
    backend = BackendConfig.from_any(backend)
    if backend.fake_balanced_gate:
        raise ValueError(
            "fake_balanced_gate=True is not offered for a transformers model, whose router stays: "
            "leave it out, or benchmark nemotron_v3.NemotronV3ForCausalLM"
        )
    for name in ("attn", "linear", "rms_norm"):
        if getattr(backend, name) == "te":
            raise ValueError(
                f"{name}='te' is not offered for a transformers model, whose modules stay as they "
                f"are: use BackendConfig({name}={getattr(BackendConfig(), name)!r})"
            )
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not offered: one of {', '.join(map(repr, LOSSES))}")
    return backend


def swap_in(
    model: theirs.NemotronHForCausalLM | theirs.NemotronHModel,
    backend: BackendConfig | None = None,
    loss: str = "logits",
) -> None:
    """`accelerate` on the language model or the backbone itself.

    Raises:
        TypeError, ValueError: see `accelerate`.
    """
    if SETTINGS in vars(model):
        raise ValueError(
            "the model is accelerated already: call nemotron_v3.hf.undo(model) first to change its "
            "backend or loss"
        )
    if loss == "linear" and not isinstance(model, theirs.NemotronHForCausalLM):
        raise ValueError(
            f"loss='linear' is for a NemotronHForCausalLM: a {type(model).__name__} computes no "
            "loss over the vocabulary"
        )
    install(model, check_options(backend, loss), loss)


def install(model: nn.Module, backend: BackendConfig, loss: str) -> None:
    """Give every module of transformers in `model`, accelerated ones included, its class and these
    settings."""
    settings = Settings(NemotronV3Config.from_any(model.config), backend, loss)
    changed = [module for module in model.modules() if is_theirs(module)]
    kinds = [accelerated_class(type(module)) for module in changed]
    for module in changed:
        _check_forward(module)
    for module, kind in zip(changed, kinds, strict=True):
        vars(module)[SETTINGS] = settings
        _set_class(module, kind)
    exempt_if_loaded()


def install_as_built(model: nn.Module) -> None:
    """`install` for a model that is being built, by the options of `register` or the defaults."""
    check_version()
    head = isinstance(model, theirs.NemotronHForCausalLM)
    install(model, AS_BUILT.backend, AS_BUILT.loss if head else "logits")


def _give_back(found: nn.Module) -> None:
    if SETTINGS not in vars(found):
        raise ValueError("the model is not accelerated: there is nothing to undo")
    mine = [module for module in found.modules() if isinstance(module, Accelerated)]
    kinds = [plain_class(type(module)) for module in mine]
    for module, kind in zip(mine, kinds, strict=True):
        _set_class(module, kind)
        vars(module).pop(SETTINGS)


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


def _check_forward(module: nn.Module) -> None:
    """Refuse a forward that was put on the module itself, which would go on calling the old one."""
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        raise ValueError(
            f"the forward of a {type(module).__name__} has been replaced "
            f"({vars(module)['forward']!r}): accelerate the model before Accelerator.prepare, a "
            "Trainer or another patch takes hold of it"
        )


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    # accelerate's hooks (device_map) hold on to the method that they wrap.
    held = vars(module).get("_old_forward")
    if isinstance(held, MethodType) and held.__self__ is module:
        vars(module)["_old_forward"] = MethodType(kind.forward, module)
