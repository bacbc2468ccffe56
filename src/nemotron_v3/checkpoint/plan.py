"""Which tensor on disk fills which tensor in memory: settled, and proven one to one, from names and
shapes alone before a byte is read."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import DTYPE_NAMES, WEIGHT_DTYPES
from nemotron_v3.checkpoint.names import EMBEDDINGS, LM_HEAD, Place, to_disk, to_memory
from nemotron_v3.checkpoint.reader import Checkpoint


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model and its buffers that a checkpoint holds, by name."""
    transient = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in module._non_persistent_buffers_set
    }
    buffers = {name: b for name, b in model.named_buffers() if name not in transient}
    return dict(model.named_parameters()) | buffers


@dataclass(frozen=True)
class Fill:
    """`disk` on disk fills `memory` in the model, or its slice `expert` where that is not None."""

    disk: str
    memory: str
    expert: int | None


@dataclass
class Plan:
    """`fills` in the order of the file; `carried` tensors; `left_out` those of layers not asked
    for; `tied_head` the head on disk of a model whose head is its embedding matrix."""

    prefix: str
    experts: str | None
    fills: list[Fill] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tied_head: str | None = None


def plan_load(
    checkpoint: Checkpoint,
    destinations: Mapping[str, Tensor],
    layers: Mapping[int, int],
    depth: int,
    tied: bool,
) -> Plan:
    """The plan that fills `destinations`, the model's parameters and buffers by name.

    `layers` maps the layers to load, as the file counts them, to those of the model; the file has
    `depth` of them. Raises `CheckpointError` with every tensor that is missing, extra, mis-shaped,
    no floating-point weight, or mapped twice.
    """
    places = {name: to_memory(name, layers) for name in checkpoint}
    problems: list[str] = []
    prefix, experts = _spelling([place for place in places.values() if place], problems)
    plan = Plan(prefix, experts)
    filled: dict[tuple[str, int | None], str] = {}
    for name, place in places.items():
        if place is not None and place.carried:
            plan.carried.append(name)
        elif place is not None and _left_out(place, layers, depth):
            plan.left_out.append(name)
        elif place is not None and place.memory == LM_HEAD and tied:
            plan.tied_head = name
            problems += _misfit(checkpoint, name, place, destinations[EMBEDDINGS])
        elif place is None or place.memory not in destinations:
            problems.append(f"unexpected: {name}, which the config gives no place")
        elif (place.memory, place.expert) in filled:
            problems.append(f"twice: {filled[place.memory, place.expert]} and {name} are the same")
        else:
            problems += _misfit(checkpoint, name, place, destinations[place.memory])
            filled[place.memory, place.expert] = name
            plan.fills.append(Fill(name, place.memory, place.expert))
    problems += _missing(filled, destinations, plan)
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: {len(problems)} differences between the tensors and config.json",
            problems,
        )
    return plan


def _left_out(place: Place, layers: Mapping[int, int], depth: int) -> bool:
    return place.layer is not None and place.layer not in layers and place.layer < depth


def _spelling(places: Collection[Place], problems: list[str]) -> tuple[str, str | None]:
    prefixes = sorted({place.prefix for place in places if place.prefix})
    experts = sorted({place.experts for place in places if place.experts})
    if len(prefixes) > 1:
        problems.append("names begin with both backbone. and model.")
    if len(experts) > 1:
        problems.append("experts are stored both one by one and stacked")
    return prefixes[0] if prefixes else "backbone.", experts[0] if experts else None


def _misfit(checkpoint: Checkpoint, name: str, place: Place, target: Tensor) -> list[str]:
    shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
    if dtype not in WEIGHT_DTYPES.values():
        return [f"dtype: {name} holds {DTYPE_NAMES[dtype]}, not BF16, F16, F32 or F64"]
    wanted = tuple(target.shape)
    if place.expert is not None:
        if place.expert >= wanted[0]:
            return [f"unexpected: {name}, the config has {wanted[0]} experts"]
        wanted = wanted[1:]
    if shape != wanted:
        return [f"shape: {name} is {shape}, the config asks for {wanted}"]
    return []


def _missing(
    filled: Mapping[tuple[str, int | None], str], destinations: Mapping[str, Tensor], plan: Plan
) -> list[str]:
    experts: dict[str, list[int]] = {}
    for memory, expert in filled:
        experts.setdefault(memory, [])
        if expert is not None:
            experts[memory].append(expert)
    problems = []
    for memory, target in destinations.items():
        held = experts.get(memory)
        if held is None:
            disk = to_disk(memory, plan.prefix)
            problems.append(f"missing: {memory} ({disk} on disk), shape {tuple(target.shape)}")
        elif held and (gaps := _gaps(held, target.shape[0])):
            problems.append(f"missing: experts {gaps} of {memory}")
    return problems


def _gaps(held: list[int], count: int) -> str:
    """The numbers below `count` that `held` lacks, as ranges: `2, 5-7`. Costs what `held` costs."""
    edges = [-1, *sorted(e for e in held if e < count), count]
    runs = [(a + 1, b - 1) for a, b in zip(edges, edges[1:], strict=False) if b - a > 1]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
