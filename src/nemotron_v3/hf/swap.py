"""Exchange the classes of a transformers model's modules for accelerated ones, and back.

Nothing else about a module is touched: parameters, buffers, children, hooks, dtypes and names stay.
"""

from types import MethodType
from typing import Any

from torch import nn
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.hf.classes import accelerated_class, is_theirs, plain_class
from nemotron_v3.hf.exemption import exempt_if_loaded
from nemotron_v3.hf.settings import AS_BUILT, SETTINGS, Accelerated, Settings
from nemotron_v3.hf.versions import check_version

LOSSES = ("logits", "linear")


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


def give_back(found: nn.Module) -> None:
    if SETTINGS not in vars(found):
        raise ValueError("the model is not accelerated: there is nothing to undo")
    mine = [module for module in found.modules() if isinstance(module, Accelerated)]
    kinds = [plain_class(type(module)) for module in mine]
    for module, kind in zip(mine, kinds, strict=True):
        _set_class(module, kind)
        vars(module).pop(SETTINGS)


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
