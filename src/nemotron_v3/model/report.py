"""Which implementation each layer of a model uses, and why."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from nemotron_v3.layers.attention import NemotronV3Attention
from nemotron_v3.layers.mamba2 import NemotronV3Mamba2Mixer
from nemotron_v3.layers.mlp import NemotronV3MLP
from nemotron_v3.layers.moe import NemotronV3Experts, NemotronV3MoE, NemotronV3Router
from nemotron_v3.layers.moe.even_router import EvenRouter
from nemotron_v3.layers.norm import NemotronV3RMSNorm
from nemotron_v3.model.head import plain_weight
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.ops.common.long_attention import LONG, takes
from nemotron_v3.ops.registry import choose

_TE = "Transformer Engine"


@dataclass(frozen=True)
class Row:
    """One computation of one layer.

    Attributes:
        layer: the module's name in the model; "" for the module reported on itself.
        computes: an op of `nemotron_v3.ops`, or `projections`.
        uses: the op's form, or the class of the projections.
        why: what decided it.
    """

    layer: str
    computes: str
    uses: str
    why: str


@dataclass(frozen=True)
class Report:
    """`rows` in the order of the model's modules; as text, equal rows of several layers are one."""

    rows: list[Row]

    def __str__(self) -> str:
        layers: dict[tuple[str, str, str], list[str]] = {}
        for row in self.rows:
            layers.setdefault((row.computes, row.uses, row.why), []).append(row.layer)
        lines = [
            (computes, uses, why, _names(names)) for (computes, uses, why), names in layers.items()
        ]
        head = ("computes", "uses", "why", "where")
        widths = [max(len(line[i]) for line in (head, *lines)) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[3]])
            for line in (head, *lines)
        )


def report(model: nn.Module) -> Report:
    """Which implementation each layer uses and why.

    Args:
        model: a model, a block or a layer of this package, or a module that holds some.

    Returns:
        A `Report`: print it, or read its `rows`.

    Raises:
        ValueError: the module holds no layer of this package.
        TypeError: no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"a {type(model).__name__} holds no layers: give a model")
    rows = [
        Row(name, computes, uses, why)
        for name, module in model.named_modules()
        for computes, uses, why in _computations(module)
    ]
    if not rows:
        raise ValueError(f"a {type(model).__name__} holds no layer of nemotron_v3: give a model")
    return Report(rows)


def _form(op: str, impl: str, module: nn.Module) -> tuple[str, str]:
    try:
        return choose(op, impl, like=next(module.parameters()))
    except RuntimeError as error:  # asked for by name, and not there: a call would raise this
        return "none", str(error)


def _computations(module: nn.Module) -> Iterator[tuple[str, str, str]]:
    match module:
        case NemotronV3RMSNorm(te_norm=None):
            plain = module.backend.rms_norm == "torch"
            impl = "portable" if plain else module.backend.impl
            form, why = _form("rms_norm", impl, module)
            yield "rms_norm", form, "rms_norm='torch'" if plain else why
        case NemotronV3RMSNorm():
            yield "rms_norm", _TE, "rms_norm='te'"
        case NemotronV3Mamba2Mixer():
            yield "mamba2", *_form("mamba2", module.backend.impl, module)
            yield "mamba2_step", *_form("mamba2_step", module.backend.impl, module)
        case NemotronV3Attention():
            if module.chosen.attn == "sdpa":
                yield "attention", *_form("attention", module.chosen.impl, module)
                yield from _long_documents(module)
            else:
                uses = {"te": _TE, "flex": "flex"}[module.chosen.attn]
                yield "attention", uses, f"attn={module.chosen.attn!r}"
            yield "cached_attention", *_form("cached_attention", module.chosen.impl, module)
        case EvenRouter():
            yield "router", "even", "fake_balanced_gate=True"
        case NemotronV3Router():
            yield "router", *_form("router", module.impl, module)
        case NemotronV3Experts():
            yield module.op, *_form(module.op, module.impl, module)
        case NemotronV3MLP():
            yield "relu2", *_form("relu2", module.impl, module)
        case NemotronV3ForCausalLM():
            if plain_weight(module.lm_head) is None:
                yield "cross_entropy", *_form("cross_entropy", "auto", module)
            else:
                impl = module.model.backend.impl
                yield "linear_cross_entropy", *_form("linear_cross_entropy", impl, module)
            yield "generation", *_generation(module)
    projections = _projections(module)
    if projections:
        classes = {f"{type(p).__module__.split('.')[0]} {type(p).__name__}" for p in projections}
        yield "projections", ", ".join(sorted(classes)), "what is in their place now"


def _generation(model: NemotronV3ForCausalLM) -> tuple[str, str]:
    from nemotron_v3.generation.graphs import why_not

    why = why_not(model)
    return ("a CUDA graph", "on a GPU, of plain layers") if why is None else ("no CUDA graph", why)


def _long_documents(module: NemotronV3Attention) -> Iterator[tuple[str, str, str]]:
    if module.impl in ("auto", "portable") and takes(next(module.parameters())):
        why = f"from {LONG} tokens on, in 16 bits on a GPU"
        yield "attention, long documents", "PyTorch's, at fixed sizes", why


def _projections(module: nn.Module) -> list[nn.Module]:
    if not isinstance(
        module, NemotronV3Mamba2Mixer | NemotronV3Attention | NemotronV3MLP | NemotronV3MoE
    ):
        return []
    return [child for name, child in module.named_children() if name.endswith("_proj")]


def _names(layers: list[str]) -> str:
    """`layers.0.norm, layers.1.norm` -> `layers.{0,1}.norm`, in the order they come."""
    numbers: dict[str, list[str]] = {}
    for layer in layers:
        parts = layer.split(".")
        number = next((part for part in parts if part.isdigit()), None)
        pattern = ".".join("#" if part == number else part for part in parts)
        numbers.setdefault(pattern, []).append(number or "")
    return ", ".join(
        pattern.replace("#", "{" + ",".join(found) + "}" if len(found) > 1 else found[0])
        for pattern, found in numbers.items()
    )
