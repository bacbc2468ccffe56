"""Router replay: record where tokens went, and send them there again.

A policy that is trained on what another engine, or the same one earlier, has generated sees other
experts where two scores lie within a rounding. Replaying the recorded choice makes the routing the
same, bit for bit; scores, weights and their gradients are those of the pass that replays.

Letters: T packed tokens, E experts, K experts a token.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemotron_v3.layers.router import NemotronV3Router, Routing, Watcher, routers, watched


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
    """Within it, every call of every router of the model is recorded.

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
                calls.append(routing.indices.detach())

        return keep

    with watched(model, watcher_of):
        yield record


@contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord | Mapping[str, Sequence[Tensor]]
) -> Iterator[None]:
    """Within it, the n-th call of a router sends the tokens where the n-th recorded one did.

    The weights are made from the scores of the experts that are forced, so gradients reach the
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
    with ExitStack() as stack:
        for name, router in found.items():
            if router.forced is not None:
                raise ValueError(f"{name} is being replayed already: leave that replay first")
            router.forced = _Calls(name, router, list(indices[name]))
            stack.callback(setattr, router, "forced", None)
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
