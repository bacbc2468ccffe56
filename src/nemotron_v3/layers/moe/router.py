"""The router, and how its choices are watched and forced from outside.

Letters: T packed tokens, D hidden size, E experts, K experts a token.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nemotron_v3 import ops
from nemotron_v3.config import MoEConfig
from nemotron_v3.layers.fp32_params import KeepsFp32, at_least_fp32
from nemotron_v3.layers.moe.scopes import Scoped, of_caller
from nemotron_v3.layout import SequenceLayout


@dataclass(frozen=True)
class Routing:
    """One call of a router, as its watchers see it.

    Attributes:
        router: who chose.
        x: `[T, D]`, the tokens.
        indices: `[T, K]` int64, the experts of each token.
        weights: `[T, K]` in fp32 or wider, with their graph.
        layout: the documents of the tokens; None where the router was called without.
        repeated: the call recomputes an earlier one for the backward pass of a checkpoint: its
            tokens were seen before, and what it adds to a graph is dropped.
    """

    router: "NemotronV3Router"
    x: Tensor
    indices: Tensor
    weights: Tensor
    layout: SequenceLayout | None
    repeated: bool


Watcher = Callable[[Routing], None]


class NemotronV3Router(KeepsFp32):
    """Sigmoid top-k router; `e_score_correction_bias` moves the choice, and the weights only where
    a `MoEConfig` says so (`router_weight_uses_score_correction_bias`).

    Logits and scores are fp32 or wider, and the bias is a persistent buffer that stays so.

    Attributes:
        watchers: called with a `Routing` at every call, whoever makes it, in their order.
        scoped: what callers do with their own calls: watch them, or force their experts.
        replays: whether the recomputation of a checkpoint sends tokens where the pass did that it
            repeats, also where nobody watches. One that chooses again may choose otherwise where
            two scores lie within a rounding: no harm on one device, but processes that exchange
            tokens would wait for those that do not come.
    """

    fp32_tensors: tuple[str, ...] = ("e_score_correction_bias",)
    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, dtype: torch.dtype | None, impl: str):
        super().__init__()
        self.top_k: int = config.n_activated_experts
        self.n_group: int = config.n_expert_groups
        self.topk_group: int = config.n_limited_groups
        self.norm_topk_prob: bool = config.norm_topk_prob
        self.scaling_factor: float = config.route_scale
        self.weights_use_bias: bool = config.router_weight_uses_score_correction_bias
        self.impl = impl
        self.watchers: list[Watcher] = []
        self.scoped: list[Scoped] = []
        self.replays = False
        dtype = config.gate_dtype or dtype
        weight = torch.empty(config.n_routed_experts, config.dim, dtype=dtype)
        self.weight: nn.Parameter = nn.Parameter(weight, requires_grad=config.train_gate)
        bias = torch.zeros(config.n_routed_experts, dtype=at_least_fp32(dtype))
        kept = config.force_e_score_correction_bias
        self.register_buffer("e_score_correction_bias", bias, persistent=kept)

    def forward(self, x: Tensor, layout: SequenceLayout | None = None) -> tuple[Tensor, Tensor]:
        """`[T, D]` -> weights `[T, K]` in fp32 or wider, and expert numbers `[T, K]`.

        Args:
            x: the tokens.
            layout: their documents, for watchers that ask; the choice does not depend on it.

        Raises:
            RuntimeError: watched or forced in the recomputation of a checkpoint that was not told
                (`checkpoint_contexts`).
        """
        if not self.observed:
            if self.scoped:
                _check_thread(x)
            return self._by_scores(x)
        call = _this_call(self, len(x))
        if call.indices is None and self.replays and in_checkpoint():
            # Weights are then made as in the recomputation, which has to keep as many tensors.
            with torch.no_grad():
                call.indices = _narrow(self._by_scores(x)[1], len(self.weight))
        if call.indices is None:
            weights, indices = self._by_scores(x)
            if call.keeps:
                call.indices = _narrow(indices, len(self.weight))
        else:
            indices = call.indices.long()
            weights = self.weights_of(x, indices)
        for watcher in call.watchers:
            watcher(Routing(self, x, indices, weights, layout, call.repeated))
        return weights, indices

    @property
    def observed(self) -> bool:
        """Whether anything is to be done besides routing, for who calls now."""
        if self.watchers:
            return True
        if (regions := _regions()) and _concerns(self, regions):
            return True
        # Asked for last: a compiler cannot, and leaves its graph here.
        return bool(self.scoped) and bool(of_caller(self.scoped))

    def scores(self, x: Tensor) -> Tensor:
        """`sigmoid(weight x)`, `[T, E]` in fp32 or wider, differentiable in both."""
        dtype = at_least_fp32(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return functional.linear(x.to(dtype), self.weight.to(dtype)).sigmoid()

    def weights_of(self, x: Tensor, indices: Tensor) -> Tensor:
        """The weights `[T, K]` that the tokens have for experts chosen elsewhere, `[T, K]`."""
        scores = self.scores(x)
        if self.weights_use_bias:
            scores = scores + self.e_score_correction_bias.to(scores.dtype)
        weights = scores.gather(1, indices)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scaling_factor

    @property
    def is_plain(self) -> bool:
        """Whether a call that nobody watches is `ops.router` and nothing more."""
        return not self.weights_use_bias

    def options(self) -> dict[str, Any]:
        """How `ops.router` is to choose."""
        return {
            "top_k": self.top_k,
            "n_group": self.n_group,
            "topk_group": self.topk_group,
            "norm_topk_prob": self.norm_topk_prob,
            "scaling_factor": self.scaling_factor,
        }

    def _by_scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, indices = ops.router(
            x, self.weight, self.e_score_correction_bias, impl=self.impl, **self.options()
        )
        return (self.weights_of(x, indices) if self.weights_use_bias else weights), indices

    def __getstate__(self) -> dict[str, Any]:
        """A copy is neither watched nor forced."""
        return self.__dict__ | {"watchers": [], "scoped": []}


def routers(model: nn.Module) -> dict[str, NemotronV3Router]:
    """The routers of a model by their names in it.

    Raises:
        ValueError: it has none.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, NemotronV3Router)}
    if not found:
        raise ValueError(
            f"a {type(model).__name__} without mixture-of-experts blocks has no router"
        )
    return found


def observed(module: nn.Module) -> bool:
    """Whether a router in it is watched or forced, for who calls now."""
    return any(m.observed for m in module.modules() if isinstance(m, NemotronV3Router))


# --- activation checkpointing ---------------------------------------------------------------------


@dataclass
class _Call:
    """What one call of a router does besides routing: forced experts, watchers; with `keeps` the
    experts that it chooses are forced when it is repeated."""

    indices: Tensor | None
    watchers: tuple[Watcher, ...]
    repeated: bool = False
    keeps: bool = False


@dataclass
class _Region:
    """A region that is computed twice: the calls of its first pass, which the second repeats."""

    keeps: bool = False
    calls: dict[NemotronV3Router, list[_Call]] = field(default_factory=dict)
    repeating: bool = False
    repeated: dict[Any, int] = field(default_factory=dict)
    made: dict[Any, list[Any]] = field(default_factory=dict)

    def call(self, router: NemotronV3Router, tokens: int, outer: "_Region | None") -> _Call:
        """The next call of a router; `outer` is the region around this one."""
        if self.repeating:
            number = self.repeated.get(router, 0)
            self.repeated[router] = number + 1
            if router not in self.calls:  # nobody watched the pass that is repeated
                return _Call(None, (), repeated=True)
            return replace(self.calls[router][number], repeated=True, keeps=False)
        if outer is not None and outer.repeating:  # a checkpoint in what is computed again itself
            call = outer.call(router, tokens, None)
        else:
            call = replace(_first_call(router, tokens), keeps=self.keeps)
        self.calls.setdefault(router, []).append(call)
        return call


_here = threading.local()  # the backward pass recomputes in a thread of its own on a GPU


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` for `torch.utils.checkpoint.checkpoint` around blocks with watched routers.

    A recomputation then forces what the forward pass forced, calls the same watchers, and tells
    them that it is one. The model's own `gradient_checkpointing_enable` uses it.
    """
    return _contexts(_Region())


def repeating_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of two passes over the same tokens, of which the second repeats the first.

    As `checkpoint_contexts`; and every token goes to the experts of the first pass again, however
    close its scores lie. Checkpoints may lie inside.
    """
    return _contexts(_Region(keeps=True))


def _contexts(region: _Region) -> tuple[AbstractContextManager, AbstractContextManager]:
    return _inside(region, repeating=False), _inside(region, repeating=True)


class _inside:
    """Entered around a region; again for every recomputation."""

    def __init__(self, region: _Region, repeating: bool):
        self.region, self.repeating = region, repeating

    def __enter__(self) -> None:
        self.before = getattr(_here, "regions", ())
        self.region.repeating, self.region.repeated = self.repeating, {}
        _here.regions = (*self.before, self.region)

    def __exit__(self, *_: Any) -> None:
        _here.regions = self.before


def in_checkpoint() -> bool:
    """Whether a region that is computed twice is at work (`checkpoint_contexts`)."""
    return bool(_regions())


def made_once(key: Hashable, make: Callable[[], Any]) -> Any:
    """`make()`; in the recomputation of a checkpoint what it gave in the pass that is repeated.

    Args:
        key: of those calls in a region that are told apart by their order alone.
    """
    regions = _regions()
    return _made(regions, key, make) if regions else make()


def _made(regions: tuple[_Region, ...], key: Hashable, make: Callable[[], Any]) -> Any:
    region, around = regions[-1], regions[:-1]
    made = region.made.setdefault(key, [])
    if not region.repeating:
        again = bool(around) and around[-1].repeating
        made.append(_made(around, key, make) if again else make())
        return made[-1]
    number = region.repeated.get(key, 0)
    region.repeated[key] = number + 1
    return made[number]


def _regions() -> tuple[_Region, ...]:
    """Those at work, the outermost first."""
    return () if torch.compiler.is_compiling() else getattr(_here, "regions", ())


def _concerns(router: NemotronV3Router, regions: tuple[_Region, ...]) -> bool:
    """Whether the call repeats one that was observed, or is to be remembered."""
    return router.replays or any(r.keeps or (r.repeating and router in r.calls) for r in regions)


def _this_call(router: NemotronV3Router, tokens: int) -> _Call:
    if regions := _regions():
        return regions[-1].call(router, tokens, regions[-2] if len(regions) > 1 else None)
    if not torch.compiler.is_compiling() and _in_backward():
        raise RuntimeError(_UNTOLD)
    return _first_call(router, tokens)


def _first_call(router: NemotronV3Router, tokens: int) -> _Call:
    """What the caller wants done at a call that repeats none."""
    mine = of_caller(router.scoped) if router.scoped else ()
    forced = next((each.forced for each in mine if each.forced is not None), None)
    watchers = (each.watcher for each in mine if each.watcher is not None)
    return _Call(None if forced is None else forced(tokens), (*router.watchers, *watchers))


def _narrow(indices: Tensor, experts: int) -> Tensor:
    """A choice in a quarter of its bytes, to be kept for long."""
    return indices.detach().to(torch.int16 if experts <= 2**15 else torch.int64)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _check_thread(x: Tensor) -> None:
    """Raises RuntimeError for a recomputation that may be that of a caller who watches or forces.

    A GPU's backward pass runs in a thread of autograd's own, which has nobody's context.
    """
    if torch.compiler.is_compiling() or x.device.type == "cpu":
        return
    if not _regions() and _in_backward():
        raise RuntimeError(_UNTOLD)


_UNTOLD = (
    "a watched or forced router is called inside a backward pass: give "
    "torch.utils.checkpoint.checkpoint context_fn=checkpoint_contexts, so that recomputed tokens "
    "are not taken for new ones (model.gradient_checkpointing_enable does), and watch or force "
    "before the forward pass"
)


@contextmanager
def watching_routers(model: nn.Module, watcher_of: Callable[[str], Watcher]) -> Iterator[None]:
    """Within it, `watcher_of(name)` watches the router of that name, whoever calls it."""
    added = [(router, watcher_of(name)) for name, router in routers(model).items()]
    for router, watcher in added:
        router.watchers.append(watcher)
    try:
        yield
    finally:
        for router, watcher in added:
            router.watchers.remove(watcher)
