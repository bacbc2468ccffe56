"""How much of a model an adapter reaches: blocks, parameters, and what it leaves as it is."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nemotron_v3.adapters.targets import (
    GROUPS,
    Targets,
    plain_name,
    projections,
    resolve,
    skeleton,
    stacks,
)
from nemotron_v3.config import NemotronV3Config

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("weight", "adapted", "parameters", "reached", "adapter")
_REST = "norms, conv, A, D, dt"


@dataclass(frozen=True)
class CoverageRow:
    """One kind of weight.

    Attributes:
        group: a name in `GROUPS`, or `other`.
        target: the weight as it can be targeted; for `other`, words.
        covered, total: how many there are, one a block, and how many have an adapter.
        covered_parameters, parameters: their elements, biases aside.
        adapter_parameters: elements of the adapters; 0 where no rank was given.
    """

    group: str
    target: str
    covered: int
    total: int
    covered_parameters: int
    parameters: int
    adapter_parameters: int

    @property
    def fraction(self) -> float:
        """Of the parameters."""
        return self.covered_parameters / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class Coverage:
    """`rows`, one for each kind of weight, and the totals.

    Attributes:
        covered_blocks, blocks: blocks with at least one adapted weight, and all.
        covered_parameters, parameters: elements of adapted weights, and of the model.
        adapter_parameters: elements of the adapters; 0 where no rank was given.
    """

    rows: tuple[CoverageRow, ...]
    covered_blocks: int
    blocks: int
    covered_parameters: int
    parameters: int
    adapter_parameters: int

    @property
    def fraction(self) -> float:
        """Of the model's parameters, those in adapted weights."""
        return self.covered_parameters / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for a log or JSON."""
        rows = [asdict(row) | {"fraction": row.fraction} for row in self.rows]
        return asdict(self) | {"rows": rows, "fraction": self.fraction}

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(title="adapter coverage", title_justify="left")
        table.add_column(_HEADINGS[0])
        for heading in _HEADINGS[1:]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in self._lines():
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        lines = [_HEADINGS, *self._lines()]
        widths = [max(len(line[i]) for line in lines) for i in range(5)]
        return "\n".join(
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
            for line in lines
        )

    def _lines(self) -> Iterator[tuple[str, ...]]:
        for row in self.rows:
            short = row.target.removeprefix("mixer.").removeprefix("shared_experts.")
            name = row.target if row.group == "other" else f"{row.group} {short}"
            adapted = f"{row.covered} of {row.total}"
            yield _line(name, adapted, row.parameters, row.fraction, row.adapter_parameters)
        blocks = f"{self.covered_blocks} of {self.blocks} blocks"
        yield _line("all", blocks, self.parameters, self.fraction, self.adapter_parameters)


def _line(
    name: str, adapted: str, parameters: int, fraction: float, adapter: int
) -> tuple[str, ...]:
    return name, adapted, _number(parameters), f"{fraction:.1%}", _number(adapter)


def _number(count: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M")):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count:,}"


def coverage(
    model: nn.Module | NemotronV3Config, targets: Targets | None = None, *, rank: int = 0
) -> Coverage:
    """What the adapter with `targets` reaches, or the adapters that are on a model already.

    Args:
        model: a model of this package or of transformers, one with PEFT's adapters, or a config.
        targets: what `lora_targets` returns, or names of modules as PEFT takes them; None reads off
            the model which of its weights have a LoRA adapter.
        rank: of a planned adapter, to count its parameters; it is read off one that is there.

    Returns:
        A `Coverage`: print it (`rich.print` draws a table), or read its `rows`.

    Raises:
        ValueError: a target that matches nothing, with the nearest names; None for a model without
            adapters.
    """
    model = skeleton(model)
    weights = _weights(model)
    if targets is None:
        adapters = _adapters(model, weights)
    else:
        names = [name for part in resolve(model, targets) for name in part]
        adapters = {name: rank * _ranks(weights[name][0]) for name in names}
    return _count(model, weights, adapters)


def _weights(model: nn.Module) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and elements of each weight that can be adapted: of modules by the module's name, of
    stacks and routers by the parameter's."""
    held = {}
    for name, module in projections(model).items():
        if isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
        else:  # a quantised weight has a shape of its own
            shape = (module.out_features, module.in_features)
        held[name] = shape
    held |= {name: tuple(parameter.shape) for name, parameter in stacks(model).items()}
    return {name: (shape, _product(shape)) for name, shape in held.items()}


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _ranks(shape: tuple[int, ...]) -> int:
    """Elements an adapter has for each of its ranks; a stack has one adapter an expert."""
    *experts, rows, columns = shape
    return _product(tuple(experts)) * (rows + columns)


def _adapters(model: nn.Module, weights: dict[str, Any]) -> dict[str, int]:
    """Elements of the LoRA adapters on each weight that has one."""
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        match = re.fullmatch(r"(.+)\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)\..+", name)
        if match:
            target = _adapted(model, match[1], weights)
            found[target] = found.get(target, 0) + parameter.numel()
    if not found:
        raise ValueError(
            f"a {type(model).__name__} has no LoRA adapters: give the targets of a planned one, or "
            "the model that PEFT returned"
        )
    return found


def _adapted(model: nn.Module, wrapper: str, weights: dict[str, Any]) -> str:
    """The weight that the LoRA layer `wrapper` adapts."""
    plain = plain_name(wrapper)
    if plain in weights:
        return plain
    # A layer around one of a module's parameters knows which.
    return f"{plain}.{model.get_submodule(wrapper).parameter_name}"


def _count(
    model: nn.Module, weights: dict[str, tuple[tuple[int, ...], int]], adapters: dict[str, int]
) -> Coverage:
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in weights:
        kinds.setdefault(_kind(name), []).append(name)
    rows = [
        CoverageRow(
            group=group,
            target=target,
            covered=sum(name in adapters for name in names),
            total=len(names),
            covered_parameters=sum(weights[name][1] for name in names if name in adapters),
            parameters=sum(weights[name][1] for name in names),
            adapter_parameters=sum(adapters.get(name, 0) for name in names),
        )
        for (group, target), names in kinds.items()
    ]
    order = [*GROUPS, "other"]
    rows.sort(key=lambda row: order.index(row.group))
    rest = _rest(model, weights)
    total = sum(row.parameters for row in rows) + sum(rest)
    if rest:
        rows.append(CoverageRow("other", _REST, 0, len(rest), 0, sum(rest), 0))
    blocks = {b for name, _ in model.named_modules() if (b := _block(plain_name(name)))}
    return Coverage(
        rows=tuple(rows),
        covered_blocks=len({b for name in adapters if (b := _block(name))}),
        blocks=len(blocks),
        covered_parameters=sum(row.covered_parameters for row in rows),
        parameters=total,
        adapter_parameters=sum(adapters.values()),
    )


def _kind(name: str) -> tuple[str, str]:
    for group, held in GROUPS.items():
        for target in held.modules + held.parameters:
            if name == target or name.endswith(f".{target}"):
                return group, target
    return "other", name.rpartition(".")[2]


def _block(name: str) -> str | None:
    match = re.match(r"(?:.*\.)?layers\.(\d+)(\.|$)", name)
    return match[1] if match else None


def _rest(model: nn.Module, weights: dict[str, Any]) -> list[int]:
    """Elements of each parameter that no adapter can stand beside."""
    return [
        _elements(parameter)
        for name, parameter in model.named_parameters()
        if ".lora_" not in name
        and plain_name(name) not in weights
        and plain_name(name).removesuffix(".weight") not in weights
    ]


def _elements(parameter: Tensor) -> int:
    return parameter.numel()
