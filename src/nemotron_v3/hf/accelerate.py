"""`accelerate` and `undo`: another computation for the modules of a transformers model.

A module's class is exchanged for the accelerated one of the same name; nothing else about it is
touched. Parameters, buffers, children, hooks, dtypes and names stay as they are, and with them
state dicts, optimisers, adapters and device maps.
"""

from types import MethodType
from typing import Any

from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.hf import layers
from nemotron_v3.hf import model as models
from nemotron_v3.hf.layers import SETTINGS, Accelerated, Settings
from nemotron_v3.hf.versions import check_version

# transformers' class -> ours.
CLASSES: dict[type[nn.Module], type[Accelerated]] = {
    theirs.NemotronHForCausalLM: models.NemotronHForCausalLM,
    theirs.NemotronHModel: models.NemotronHModel,
    theirs.NemotronHBlock: layers.NemotronHBlock,
    theirs.NemotronHRMSNorm: layers.NemotronHRMSNorm,
    theirs.NemotronHMamba2Mixer: layers.NemotronHMamba2Mixer,
    theirs.NemotronHAttention: layers.NemotronHAttention,
    theirs.NemotronHMLP: layers.NemotronHMLP,
    theirs.NemotronHMoE: layers.NemotronHMoE,
    theirs.NemotronHTopkRouter: layers.NemotronHTopkRouter,
    theirs.NemotronHExperts: layers.NemotronHExperts,
}
BACK: dict[type[Accelerated], type[nn.Module]] = {ours: their for their, ours in CLASSES.items()}
LOSSES = ("logits", "linear")


def accelerate(
    model: nn.Module, *, backend: BackendConfig | None = None, loss: str = "logits"
) -> nn.Module:
    """Let this package compute a transformers Nemotron-H model, in place.

    Call it before the model is sharded (FSDP) or handed to `Accelerator.prepare` or a `Trainer`;
    before or after adapters are added.

    Args:
        model: a transformers `NemotronHForCausalLM`, or a module that holds exactly one, such as a
            `PeftModel`.
        backend: which form of each op runs: `impl`, `attn` (`"sdpa"`, `"flex"`) and `rms_norm`
            (`"auto"`, `"torch"`) of a `BackendConfig`; None is the default one.
        loss: `"logits"` always returns logits, as transformers does; `"linear"` computes the
            training loss from some tokens' logits at a time and returns none with it.

    Returns:
        `model` itself.

    Raises:
        ImportError: a transformers outside the supported versions.
        TypeError: no Nemotron-H model of transformers in it, more than one, or one with classes of
            its own.
        ValueError: a model that is accelerated already, a config or option that is not offered, a
            `forward` that something else has replaced. The model is as it was, in every case.
    """
    check_version()
    swap_in(_find(model), backend, loss)
    return model


def undo(model: nn.Module) -> nn.Module:
    """Give an accelerated model back to transformers.

    Args:
        model: what `accelerate` took, or a model that was loaded accelerated.

    Returns:
        `model` itself, computing bit for bit what it did before.

    Raises:
        TypeError: no Nemotron-H model of transformers in it, or more than one.
        ValueError: a model that is not accelerated, or that has been sharded since.
    """
    found = _find(model)
    if not is_accelerated(found):
        raise ValueError("the model is not accelerated: there is nothing to undo")
    mine = [module for module in found.modules() if isinstance(module, Accelerated)]
    for module in mine:
        if type(module) not in BACK:
            raise ValueError(
                f"a {type(module).__name__} has been put in the place of an accelerated class "
                "(FSDP does that): undo before sharding"
            )
    for module in mine:
        _set_class(module, BACK[type(module)])
        vars(module).pop(SETTINGS)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether `accelerate` has been through a model, or through the one it holds."""
    return any(isinstance(module, models.NemotronHForCausalLM) for module in model.modules())


def swap_in(
    model: theirs.NemotronHForCausalLM,
    backend: BackendConfig | None = None,
    loss: str = "logits",
) -> None:
    """`accelerate` on the language model itself, which may be an accelerated class built just now.

    Raises:
        TypeError, ValueError: see `accelerate`.
    """
    if SETTINGS in vars(model):
        raise ValueError(
            "the model is accelerated already: call nemotron_v3.hf.undo(model) first to change its "
            "backend or loss"
        )
    settings = Settings(NemotronV3Config.from_any(model.config), _backend(backend), _loss(loss))
    changed = [module for module in model.modules() if _is_theirs(module)]
    for module in changed:
        _check_class(module)
        _check_forward(module)
    for module in changed:
        vars(module)[SETTINGS] = settings
        _set_class(module, CLASSES.get(type(module), type(module)))


def _find(model: Any) -> theirs.NemotronHForCausalLM:
    """The one language model of transformers in a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} is no model: give a NemotronHForCausalLM")
    found = [m for m in model.modules() if isinstance(m, theirs.NemotronHForCausalLM)]
    if len(found) == 1:
        return found[0]
    kind = f"{type(model).__module__}.{type(model).__name__}"
    if not found:
        raise TypeError(
            f"no NemotronHForCausalLM of transformers in a {kind}: load a Nemotron-H checkpoint "
            "with AutoModelForCausalLM.from_pretrained(path), without trust_remote_code"
        )
    raise TypeError(f"{len(found)} language models in a {kind}: give one of them")


def _is_theirs(module: nn.Module) -> bool:
    return isinstance(module, tuple(CLASSES))


def _check_class(module: nn.Module) -> None:
    """Refuse a subclass, whose own forward would be lost."""
    if type(module) not in CLASSES and type(module) not in BACK:
        raise TypeError(
            f"a {type(module).__module__}.{type(module).__qualname__} is a subclass of "
            "transformers' own class, and what it computes would be lost: accelerate the model "
            "before it is sharded or patched"
        )


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


def _backend(backend: Any) -> BackendConfig:
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
    return backend


def _loss(loss: str) -> str:
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} is not offered: one of {', '.join(map(repr, LOSSES))}")
    return loss
