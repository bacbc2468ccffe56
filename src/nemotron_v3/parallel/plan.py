"""How a model is spread over processes: which of them share what."""

from dataclasses import dataclass
from math import comb
from typing import Literal

DISPATCHERS = ("auto", "gather", "all_to_all")
MOST_GATHERED = 1.35  # rows that a gather sends for each one that has to go


@dataclass(frozen=True)
class Plan:
    """Sizes of the groups that the processes form; every process has tokens of its own.

    There are `dp_replicate` sets of `dp_shard` processes. Each set holds the whole model, a part of
    every tensor on each of its processes. The experts of a layer lie on `ep` processes of a set,
    whole ones on each; where `ep < dp_shard`, several hold the same experts and share their rows.

    Attributes:
        dp_replicate: sets of processes that hold the whole model each.
        dp_shard: processes of a set; None is all that there are, divided by `dp_replicate`.
        ep: processes that the experts of a layer are spread over; it divides `dp_shard` and the
            number of experts.
        dispatcher: how tokens come to their experts. "gather" brings all tokens of the group to
            each of its processes: nothing is counted, and no host waits for its device.
            "all_to_all" sends a token to the processes that have one of its experts. "auto" gathers
            while that sends at most 1.35 times as many rows.

    Raises:
        ValueError: sizes that are no positive integers, an unknown dispatcher.
    """

    dp_replicate: int = 1
    dp_shard: int | None = None
    ep: int = 1
    dispatcher: Literal["auto", "gather", "all_to_all"] = "auto"

    def __post_init__(self) -> None:
        sizes = {"dp_replicate": self.dp_replicate, "dp_shard": self.dp_shard, "ep": self.ep}
        for name, size in sizes.items():
            may_be_none = name == "dp_shard" and size is None
            if not may_be_none and (type(size) is not int or size < 1):
                raise ValueError(f"Plan.{name} is {size!r}: give an integer of at least 1")
        if self.dispatcher not in DISPATCHERS:
            raise ValueError(f"Plan.dispatcher is {self.dispatcher!r}: give one of {DISPATCHERS}")

    def over(self, world: int) -> "Plan":
        """The plan for so many processes, with `dp_shard` settled.

        Raises:
            ValueError: sizes that do not make up these processes.
        """
        shard = self.dp_shard if self.dp_shard is not None else world // self.dp_replicate
        if shard * self.dp_replicate != world:
            raise ValueError(
                f"the plan has dp_replicate = {self.dp_replicate} times dp_shard = "
                f"{self.dp_shard or 'what is left'}, and there are {world} processes: their "
                "product must be that number"
            )
        if shard % self.ep:
            raise ValueError(
                f"ep = {self.ep} does not divide dp_shard = {shard}: the experts of a layer lie on "
                "processes of one set"
            )
        return Plan(self.dp_replicate, shard, self.ep, self.dispatcher)

    def gathers(self, experts: int, choices: int) -> bool:
        """Whether tokens of so many choices among so many experts are gathered."""
        if self.dispatcher != "auto":
            return self.dispatcher == "gather"
        return gathered_rows(self.ep) <= MOST_GATHERED * sent_rows(experts, choices, self.ep)


def gathered_rows(ep: int) -> float:
    """Rows that a process sends for each of its tokens where all are brought to all."""
    return ep - 1.0


def sent_rows(experts: int, choices: int, ep: int) -> float:
    """Rows that a process sends for each of its tokens, one to each other process that has an
    expert of it: the mean for choices that are even."""
    here = experts // ep
    reached = ep * (1 - comb(experts - here, choices) / comb(experts, choices))
    return reached * (ep - 1) / ep
