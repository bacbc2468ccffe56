"""How a model is spread over processes: which of them share what."""

from dataclasses import dataclass, replace
from math import comb
from typing import Literal

from nemotron_v3.parallel.shares import ORDERS, Order

DISPATCHERS = ("auto", "gather", "all_to_all")
MOST_GATHERED = 1.35  # rows that a gather sends for each one that has to go


@dataclass(frozen=True)
class Plan:
    """Sizes of the groups that the processes form.

    There are `dp_replicate` sets of `dp_shard` times `cp` processes. Each set holds the whole
    model, a part of every tensor on each of its processes. The experts of a layer lie on `ep`
    processes of a set, whole ones on each; where those are fewer than the set, several hold the
    same experts and share their rows. Every `cp` processes, of ranks that follow each other, share
    the tokens of one batch; different groups of them have different batches.

    Attributes:
        dp_replicate: sets of processes that hold the whole model each.
        dp_shard: batches of a set; None is all processes that there are, divided by `dp_replicate`
            and `cp`.
        ep: processes that the experts of a layer are spread over; it divides `dp_shard` times `cp`
            and the number of experts.
        dispatcher: how tokens come to their experts. "gather" brings all tokens of the group to
            each of its processes: nothing is counted, and no host waits for its device.
            "all_to_all" sends a token to the processes that have one of its experts. "auto" gathers
            while that sends at most 1.35 times as many rows.
        cp: processes that share the tokens of a batch, and of a document (context parallelism).
        cp_layout: how the tokens go to them: "contiguous", "zigzag" or "auto", as in
            `nemotron_v3.parallel.context.context_parallel`.

    Raises:
        ValueError: sizes that are no positive integers, an unknown dispatcher or layout.
    """

    dp_replicate: int = 1
    dp_shard: int | None = None
    ep: int = 1
    dispatcher: Literal["auto", "gather", "all_to_all"] = "auto"
    cp: int = 1
    cp_layout: Order = "auto"

    def __post_init__(self) -> None:
        for name in ("dp_replicate", "dp_shard", "ep", "cp"):
            size = getattr(self, name)
            may_be_none = name == "dp_shard" and size is None
            if not may_be_none and (type(size) is not int or size < 1):
                raise ValueError(f"Plan.{name} is {size!r}: give an integer of at least 1")
        for name, known in (("dispatcher", DISPATCHERS), ("cp_layout", ORDERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Plan.{name} is {getattr(self, name)!r}: give one of {known}")

    @property
    def set_size(self) -> int:
        """Processes that hold the model once, of a plan with `dp_shard` settled."""
        return (self.dp_shard or 1) * self.cp

    def over(self, world: int) -> "Plan":
        """The plan for so many processes, with `dp_shard` settled.

        Raises:
            ValueError: sizes that do not make up these processes.
        """
        if type(world) is not int or world < 1:
            raise ValueError(f"a plan is over {world!r} processes: give an integer of at least 1")
        if self.dp_shard is None and self.cp > 1 and world % (self.dp_replicate * self.cp):
            raise ValueError(
                f"cp = {self.cp} times dp_replicate = {self.dp_replicate} does not divide the "
                f"{world} processes: as many processes share each batch"
            )
        settled = self.dp_shard
        if settled is None:
            settled = world // (self.dp_replicate * self.cp)
        shard = "dp_shard" if self.cp == 1 else f"cp = {self.cp} times dp_shard"
        if settled * self.cp * self.dp_replicate != world:
            raise ValueError(
                f"the plan has dp_replicate = {self.dp_replicate} times {shard} = "
                f"{self.dp_shard or 'what is left'}, and there are {world} processes: their "
                "product must be that number"
            )
        plan = replace(self, dp_shard=settled)
        if plan.set_size % self.ep:
            raise ValueError(
                f"ep = {self.ep} does not divide {shard} = {settled}: the experts of a layer lie "
                "on processes of one set"
            )
        return plan

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
