"""Whether all processes are about to do the same: asked before anything is changed."""

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

WAIT = timedelta(minutes=10)  # for a process that is still reading its weights, say
FIRST = 8  # values of a tensor that are compared


class Disagreement(ValueError):
    """Processes that differ in what they are to do together; every one of them raises it."""


def host_group(timeout: timedelta = WAIT) -> ProcessGroup:
    """A group of all processes that speaks through the hosts, whatever carries tensors.

    Raises:
        RuntimeError: a process that does not come within the time, by its rank.
    """
    group = joined(dist.new_group(backend="gloo", timeout=timeout))
    dist.monitored_barrier(group, timeout, wait_all_ranks=True)
    return group


def joined(group: ProcessGroup | int | None) -> ProcessGroup:
    """A group that this process is in: PyTorch has a number where it is not."""
    assert isinstance(group, ProcessGroup)
    return group


def agree(
    problem: str | None,
    said: Mapping[str, str],
    group: ProcessGroup,
    *,
    team: int = 0,
    what: str = "the same model and plan",
) -> None:
    """Raise on all processes where one has a problem, or says something that others do not.

    Args:
        problem: what this process cannot do, or None.
        said: what has to be the same everywhere, by what it is called.
        group: the processes that all raise.
        team: a number; only those that give the same one have to say the same.
        what: of which they speak, for the error.

    Raises:
        ValueError: the problem, where all have the same one.
        Disagreement: the ranks that stand out, and what they say.
    """
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (problem, team, dict(said)), group=group)
    problems = [each for each, _, _ in everyone]
    if any(problems):
        told = [f"rank {rank}: {each}" for rank, each in enumerate(problems) if each]
        if len(set(problems)) == 1:
            raise ValueError(problems[0])
        raise Disagreement("not all processes can be part of this; " + "; ".join(told))
    teams: dict[int, dict[int, dict[str, str]]] = {}
    for rank, (_, of, each) in enumerate(everyone):
        teams.setdefault(of, {})[rank] = each
    differences = [told for each in teams.values() for told in _differences(each)]
    if differences:
        raise Disagreement(f"the processes do not hold {what}: " + "; ".join(differences))


def _differences(said: dict[int, dict[str, str]]) -> Iterator[str]:
    """One line for each of the first few things that are not the same everywhere, by rank."""
    names = list(dict.fromkeys(name for each in said.values() for name in each))
    told = 0
    for name in names:
        values = {rank: each.get(name, "nothing") for rank, each in said.items()}
        first = next(iter(values.values()))
        counts = Counter(values.values()).items()
        usual = max(counts, key=lambda item: (item[1], item[0] == first))[0]
        others = [rank for rank, value in values.items() if value != usual]
        if others and told == 3:
            yield "and more"
            return
        if others:
            told += 1
            ranks = ", ".join(map(str, others))
            yield (
                f"rank {ranks} has {name} = {_short(values[others[0]])} where others have "
                f"{_short(usual)}"
            )


def description(model: nn.Module) -> dict[str, str]:
    """What a process says of its model: the tensors' names, shapes, dtypes and first values."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: _described(tensor) for name, tensor in tensors.items()}


def _described(tensor: Tensor) -> str:
    told = f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")
    if isinstance(tensor, nn.Parameter):
        told += ", trained" if tensor.requires_grad else ", frozen"
    if tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter):
        return told
    values = tensor.detach().flatten()[:FIRST].to(device="cpu", dtype=torch.float64)
    return f"{told}, first values {' '.join(f'{value:.9g}' for value in values.tolist())}"


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[:most] + " ..."
