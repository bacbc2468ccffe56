"""Router replay: record where tokens went, and send them there again.

A policy that is trained on what another engine, or the same one earlier, has generated sees other
experts where two scores lie within a rounding. Replaying the recorded choice makes the routing the
same, bit for bit; scores, weights and their gradients are those of the pass that replays.

Both belong to who asks for them (`scopes.py`): another thread or async task that uses the model
meanwhile is neither recorded nor forced.

Letters: T packed tokens, E experts, K experts a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemotron_v3.layers.moe.router import NemotronV3Router, Routing, Watcher, routers
from nemotron_v3.layers.moe.scopes import HasScopes, Scope, Scoped, of_caller, scoped
from nemotron_v3.layout.modes import kept


@dataclass
class RoutingRecord:
    """The experts that tokens went to.

    Attributes:
        indices: by the router's name in the model, one `[T, K]` int64 a call, in the order of the
            calls, on the device where they were chosen. T are the real tokens, without padding.
    """

    indices: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Within it, every call that the caller makes of every router of the model is recorded.

    Calls of other threads and async tasks are not, but for tasks that are made within it.

    Args:
        model: a model, a block, or anything that holds routers.

    Raises:
        ValueError: no router in it.
    """
    record = RoutingRecord()

    def watcher_of(name: str) -> Watcher:
        calls = record.indices.setdefault(name, [])

        def keep(routing: Routing) -> None:
            if not routing.repeated:
                calls.append(kept(routing.indices.detach()))

        return keep

    def make(scope: Scope) -> list[tuple[HasScopes, Scoped]]:
        found = routers(model).items()
        return [(router, Scoped(scope, watcher=watcher_of(name))) for name, router in found]

    with scoped(make):
        yield record


@contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord | Mapping[str, Sequence[Tensor]]
) -> Iterator[None]:
    """Within it, the caller's n-th call of a router sends tokens where the n-th recorded one did.

    Other threads and async tasks, but for tasks that are made within it, are routed as always. The
    weights are made from the scores of the experts that are forced, so gradients reach the
    router as always. The backward pass may lie outside, also that of checkpoints.

    Args:
        model: as for `record_routing`; names as they were recorded.
        record: a `RoutingRecord`, or its `indices`.

    Raises:
        ValueError: other routers, another K, indices out of range (their values are read here,
            once); at a call: another number of tokens, or no recorded call left.
    """
    indices = record.indices if isinstance(record, RoutingRecord) else record
    found = routers(model)
    if found.keys() != indices.keys():
        missing, extra = found.keys() - indices.keys(), indices.keys() - found.keys()
        raise ValueError(
            f"the record does not fit the model: no record of {sorted(missing) or 'none'}, no "
            f"router named {sorted(extra) or 'none'}"
        )
    for name, router in found.items():
        for call in indices[name]:
            _check(name, router, call)
        if any(each.forced is not None for each in of_caller(router.scoped)):
            raise ValueError(f"{name} is being replayed already: leave that replay first")

    def make(scope: Scope) -> list[tuple[HasScopes, Scoped]]:
        calls = {name: _Calls(name, router, list(indices[name])) for name, router in found.items()}
        return [(router, Scoped(scope, forced=calls[name])) for name, router in found.items()]

    with scoped(make):
        yield


class _Calls:
    """The recorded calls of one router, handed out one by one."""

    def __init__(self, name: str, router: NemotronV3Router, calls: list[Tensor]):
        self.name, self.router, self.calls, self.next = name, router, calls, 0

    def __call__(self, tokens: int) -> Tensor:
        if self.next == len(self.calls):
            raise ValueError(f"{self.name}: all {self.next} recorded calls have been replayed")
        indices = self.calls[self.next]
        if len(indices) != tokens:
            raise ValueError(
                f"{self.name}: call {self.next} was recorded with {len(indices)} tokens and is "
                f"replayed with {tokens}: replay the same tokens in the same calls"
            )
        self.next += 1
        if indices.is_inference():  # recorded in inference mode, perhaps replayed in training
            indices = indices.clone()
        return indices.to(self.router.weight.device)


def _check(name: str, router: NemotronV3Router, indices: Tensor) -> None:
    experts, top_k = len(router.weight), router.top_k
    if indices.dtype != torch.int64 or indices.dim() != 2 or indices.shape[1] != top_k:
        raise ValueError(
            f"{name}: recorded indices are {indices.dtype} {tuple(indices.shape)}, the router "
            f"chooses torch.int64 (tokens, {top_k})"
        )
    if len(indices):
        low, high = indices.aminmax()
        if low < 0 or high >= experts:
            raise ValueError(
                f"{name}: recorded indices reach from {int(low)} to {int(high)}, the experts from "
                f"0 to {experts - 1}"
            )
