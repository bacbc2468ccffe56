"""Which implementation each layer of an accelerated model uses, and why."""

from collections.abc import Iterator

from torch import nn

from nemotron_v3.hf import layers
from nemotron_v3.hf import model as models
from nemotron_v3.hf.layers import Accelerated
from nemotron_v3.model.report import Report, Row
from nemotron_v3.ops.registry import choose


def report(model: nn.Module) -> Report:
    """Which implementation each layer uses and why, as `nemotron_v3.report` says it of our models.

    Args:
        model: an accelerated model, or a module that holds one.

    Returns:
        A `Report`: print it, or read its `rows`.

    Raises:
        ValueError: nothing accelerated in it.
    """
    rows = [
        Row(name, computes, uses, why)
        for name, module in model.named_modules()
        if isinstance(module, Accelerated)
        for computes, uses, why in _computations(module)
    ]
    if not rows:
        raise ValueError(
            f"a {type(model).__name__} holds nothing accelerated: call "
            "nemotron_v3.hf.accelerate(model) first"
        )
    return Report(rows)


def _computations(module: Accelerated) -> Iterator[tuple[str, str, str]]:
    backend = module.settings.backend
    match module:
        case layers.NemotronHRMSNorm() if backend.rms_norm == "torch":
            yield "rms_norm", "portable", "rms_norm='torch'"
        case layers.NemotronHAttention() if backend.attn == "flex":
            yield "attention", "flex", "attn='flex'"
            yield "cached_attention", *_form("cached_attention", module)
        case _:
            for op in _OPS.get(type(module), ()):
                yield op, *_form(op, module)
    projections = [child for name, child in module.named_children() if name.endswith("_proj")]
    if projections:
        classes = {f"{type(p).__module__.split('.')[0]} {type(p).__name__}" for p in projections}
        yield "projections", ", ".join(sorted(classes)), "what is in their place now"


_OPS: dict[type[Accelerated], tuple[str, ...]] = {
    layers.NemotronHRMSNorm: ("rms_norm",),
    layers.NemotronHMamba2Mixer: ("mamba2", "mamba2_step"),
    layers.NemotronHAttention: ("attention", "cached_attention"),
    layers.NemotronHMLP: ("relu2",),
    layers.NemotronHTopkRouter: ("router",),
    layers.NemotronHExperts: ("experts",),
    models.NemotronHForCausalLM: ("cross_entropy", "linear_cross_entropy"),
}


def _form(op: str, module: Accelerated) -> tuple[str, str]:
    if isinstance(module, models.NemotronHForCausalLM):
        linear = module.settings.loss == "linear"
        if linear != (op == "linear_cross_entropy"):
            return "none", f"loss={module.settings.loss!r}"
    try:
        return choose(op, module.impl, like=next(module.parameters()))
    except RuntimeError as error:  # a form asked for by name is missing: a call would raise this
        return "none", str(error)
