"""Balance of the experts: counting their tokens, moving the bias, an auxiliary loss.

Three ways to train a router, by what is called (docs/routing.md): frozen (nothing), loss-free
(`ExpertLoad` and `balance_`), and with a sequence-level loss (`BalanceLoss`).

Letters: T packed tokens, D documents, E experts, K experts a token.
"""

import math
import threading
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nemotron_v3.layers.moe.router import (
    NemotronV3Router,
    Routing,
    Watcher,
    routers,
    watching_routers,
)
from nemotron_v3.layout import SequenceLayout


@dataclass(frozen=True)
class LoadMetrics:
    """How evenly a router used its experts. Tensors stay on the device: reading one waits for it.

    Attributes:
        share: `[E]` fp32, each expert's part of all choices; they sum to 1.
        entropy: of `share`, divided by log E: 1 is even, 0 is one expert.
        max_violation: the most loaded expert's tokens above an even load, as a part of that: 0 is
            even (Wang et al. 2024).
        idle: int64, how many experts got no token.
        score_entropy: mean over tokens of the entropy of their scores divided by their sum, over
            log E; None where `ExpertLoad` was not asked for it.
    """

    share: Tensor
    entropy: Tensor
    max_violation: Tensor
    idle: Tensor
    score_entropy: Tensor | None = None


class ExpertLoad:
    """Counts the tokens of each expert, from its making until `close`, without waiting for a GPU.

    Padding is never routed and never counted, nor are tokens that a checkpoint recomputes. Counts
    add up over forward passes, so over gradient accumulation. A context manager too.

    Args:
        model: a model, a block, or anything that holds routers.
        training_only: count only calls in training mode.
        scores: also measure the entropy of the scores, at the price of computing them again.

    Attributes:
        counts: by the router's name, `[E]` int64 on its device, once it was called.

    Raises:
        ValueError: no router in it.
    """

    def __init__(self, model: nn.Module, *, training_only: bool = True, scores: bool = False):
        self.routers: dict[str, NemotronV3Router] = routers(model)
        self.training_only: bool = training_only
        self.scores: bool = scores
        self.counts: dict[str, Tensor] = {}
        self._entropies: dict[str, Tensor] = {}
        self._counting = threading.Lock()  # passes may run side by side
        self._watching = ExitStack()
        self._watching.enter_context(watching_routers(model, self._watcher_of))

    def metrics(self) -> dict[str, LoadMetrics]:
        """Of each router that was called, by its name, since the last `reset`; shares and entropies
        are 0 where it has seen no token since."""
        return {name: self._metrics(name, counts) for name, counts in self.counts.items()}

    def reset(self) -> None:
        """Start from 0."""
        for total in (*self.counts.values(), *self._entropies.values()):
            total.zero_()  # in place: a captured CUDA graph goes on adding to them

    def close(self) -> None:
        """Stop counting; what was counted stays."""
        self._watching.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _metrics(self, name: str, counts: Tensor) -> LoadMetrics:
        experts, chosen = len(counts), counts.sum().clamp(min=1)
        share = counts.to(torch.float32) / chosen
        even = math.log(experts) if experts > 1 else 1.0
        entropy = self._entropies.get(name)
        if entropy is not None:
            entropy = entropy * self.routers[name].top_k / (chosen * even)
        return LoadMetrics(
            share=share,
            entropy=torch.special.entr(share).sum() / even,
            max_violation=share.max() * experts - 1,
            idle=(counts == 0).sum(),
            score_entropy=entropy,
        )

    def _watcher_of(self, name: str) -> Watcher:
        def count(routing: Routing) -> None:
            if routing.repeated or (self.training_only and not routing.router.training):
                return
            # A compiler traces one call at a time, and knows no locks.
            alone = nullcontext() if torch.compiler.is_compiling() else self._counting
            # Counts outlive the mode that a call runs in.
            with torch.inference_mode(False), torch.no_grad(), alone:
                self._count(name, routing)

        return count

    def _count(self, name: str, routing: Routing) -> None:
        chosen, experts = routing.indices.flatten(), len(routing.router.weight)
        if name not in self.counts or self.counts[name].device != chosen.device:
            before = self.counts.get(name, chosen.new_zeros(experts))
            self.counts[name] = before.to(chosen.device)
        self.counts[name].scatter_add_(0, chosen, torch.ones_like(chosen))
        if self.scores:
            share = routing.router.scores(routing.x)
            entropy = torch.special.entr(share / share.sum(1, keepdim=True)).sum()
            before = self._entropies.get(name, torch.zeros_like(entropy))
            self._entropies[name] = before.to(entropy.device).add_(entropy)


@torch.no_grad()
def balance_(
    load: ExpertLoad, rate: float, *, reduce: Callable[[Tensor], Tensor | None] | None = None
) -> None:
    """Move each router's bias towards an even load, and start counting anew.

    `bias_e += rate sign(mean load - load_e)` (Wang et al. 2024, arXiv 2408.15664): an expert with
    too many tokens is chosen less often, and no gradient is disturbed. To be called after the
    optimiser's step, once for all its forward passes.

    Args:
        load: what was counted since the last call.
        rate: of the bias, which is added to scores between 0 and 1; 1e-3 in the paper. 0 counts
            anew and moves nothing.
        reduce: adds up a tensor of counts, int64, over the processes that share the model, in place
            or as its result: `torch.distributed.all_reduce` is one. Called once.

    Raises:
        ValueError: a negative rate.
        RuntimeError: nothing was counted, and there is no other process that may have.
    """
    if not rate >= 0:
        raise ValueError(f"the rate of the bias must not be negative, got {rate}")
    if reduce is None and not load.counts:
        raise RuntimeError(
            "no token was counted: make the ExpertLoad before the forward passes, and run those in "
            "training mode (or with training_only=False)"
        )
    counts = {
        name: load.counts.get(name, torch.zeros_like(bias, dtype=torch.int64))
        for name, bias in _biases(load).items()
    }
    if reduce is not None:
        together = torch.cat([c.to(next(iter(counts.values())).device) for c in counts.values()])
        reduced = reduce(together)
        together = reduced if isinstance(reduced, Tensor) else together
        parts = together.split([len(c) for c in counts.values()])
        counts = dict(zip(counts, parts, strict=True))
    for name, bias in _biases(load).items():
        count = counts[name].to(bias.device)
        # In integers: E times a count against their sum, so that an even load moves nothing.
        bias.add_((count.sum() - count * len(count)).sign(), alpha=rate)
    load.reset()


def _biases(load: ExpertLoad) -> dict[str, Tensor]:
    for name, router in load.routers.items():
        if "e_score_correction_bias" not in router.state_dict():
            raise RuntimeError(
                f"{name} was made without a bias (force_e_score_correction_bias=False), so that "
                "what is moved would be in no state dict: leave that field True"
            )
    return {name: router.e_score_correction_bias for name, router in load.routers.items()}


class BalanceLoss:
    """The sequence-level balance loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    For each document of T tokens, with the scores s divided by their sum over the experts,

        L = coefficient * sum_e f_e P_e,   f_e = E / (K T) * choices of e,   P_e = mean_t s_te,

    the mean over documents that have tokens, summed over routers and over forward passes since the
    last `take`. f are the choices that were made, which the bias takes part in; they have no
    gradient. The loss is `coefficient` a router where the scores are even.

        with BalanceLoss(model, 1e-4) as balance:
            loss = model(ids, labels=ids).loss + balance.take()
        loss.backward()

    Args:
        model: a model, a block, or anything that holds routers.
        coefficient: of the loss.

    Raises:
        ValueError: no router in it, or a negative coefficient.
    """

    def __init__(self, model: nn.Module, coefficient: float):
        if not coefficient >= 0:
            raise ValueError(f"the coefficient must not be negative, got {coefficient}")
        self.coefficient = coefficient
        self._terms: list[Tensor] = []
        # By the layout of their tokens, which a checkpoint's recomputation has again.
        self._parts: WeakKeyDictionary[SequenceLayout, BalanceInParts] = WeakKeyDictionary()
        self._watching = ExitStack()
        self._watching.enter_context(watching_routers(model, lambda name: self._watch))

    def take(self) -> Tensor | float:
        """The loss of the forward passes since the last call; 0.0 where there were none."""
        terms, self._terms = self._terms, []
        return sum(terms) if terms else 0.0

    def close(self) -> None:
        """Stop watching."""
        self._watching.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    @contextmanager
    def in_parts(
        self, layout: SequenceLayout, reduce: Callable[[Tensor], Tensor | None] | None = None
    ) -> Iterator["BalanceInParts"]:
        """Within it the tokens of a router's calls are parts of the documents of `layout`.

        Args:
            layout: of all tokens, packed.
            reduce: adds up counts over the processes that share the documents, as in `balance_`.

        What `take` returns afterwards is the whole loss, whose gradient is that of the parts'
        terms and was made with them.
        """
        parts = BalanceInParts(self.coefficient, layout, self._parts, reduce)
        yield parts
        self._terms += parts.values

    def _watch(self, routing: Routing) -> None:
        parts = None if routing.layout is None else self._parts.get(routing.layout)
        if parts is not None:
            parts.watch(routing)
            return
        if not (routing.router.training and torch.is_grad_enabled() and len(routing.x)):
            return
        # Computed in a recomputation too, which has to make the graph that the forward pass made.
        term = self.coefficient * sequence_balance(
            routing.router.scores(routing.x), routing.indices, routing.layout
        )
        if not routing.repeated:
            self._terms.append(term)


def check_balance(model: nn.Module, balance: BalanceLoss | None) -> None:
    """Raises ValueError for a loss that watches the model and would take parts of documents for
    whole ones; `balance` is told that they are parts."""
    for name, router in model.named_modules():
        for watcher in router.watchers if isinstance(router, NemotronV3Router) else ():
            owner = getattr(watcher, "__self__", None)
            if isinstance(owner, BalanceLoss) and owner is not balance:
                raise ValueError(
                    f"{name} is watched by a BalanceLoss, which would take parts of documents for "
                    "whole ones: give it as balance=..."
                )


class BalanceInParts:
    """The balance loss of documents whose tokens come in several calls of a router.

    `sum_e f_e P_e` is linear in the scores once the choices of whole documents are counted: each
    token then has a term of its own. So every call is counted first, and what is repeated for the
    backward pass, or is the last to be counted, has terms.

    Args:
        coefficient: of the loss.
        layout: of all tokens, packed.
        found: where calls with a part's layout look for this.
        reduce: adds up counts over the processes that share the documents; None where there are
            none.

    Attributes:
        values: the terms that were taken, without their graphs.
    """

    def __init__(
        self,
        coefficient: float,
        layout: SequenceLayout,
        found: MutableMapping[SequenceLayout, "BalanceInParts"],
        reduce: Callable[[Tensor], Tensor | None] | None = None,
    ):
        self.coefficient, self.layout, self.reduce = coefficient, layout, reduce
        self._found = found
        self.values: list[Tensor] = []
        self._choices: dict[nn.Module, Tensor] = {}
        self._documents: WeakKeyDictionary[SequenceLayout, Tensor] = WeakKeyDictionary()
        self._terms: list[Tensor] = []

    def begin(self, part: SequenceLayout, places: slice | Tensor) -> None:
        """Calls with the layout `part` have these of the packed tokens; the next ones do."""
        if part not in self._documents:
            self._documents[part] = self.layout.seq_idx[places].long()
        self._found[part] = self
        self._terms = []

    def watch(self, routing: Routing) -> None:
        """Count a call, and make its term where a graph is made."""
        if not routing.router.training or (self.reduce is None and not len(routing.x)):
            return
        assert routing.layout is not None
        document = self._documents[routing.layout]
        documents, experts = self.layout.num_documents, len(routing.router.weight)
        if not routing.repeated:
            new = _choices_of(routing.indices, document, documents, experts)
            if self.reduce is not None:
                reduced = self.reduce(new)
                new = reduced if isinstance(reduced, Tensor) else new
            before = self._choices.get(routing.router)
            self._choices[routing.router] = new if before is None else before + new
        if torch.is_grad_enabled():
            term = _balance_of(
                routing.router.scores(routing.x),
                document,
                self._choices[routing.router],
                routing.indices.shape[1],
                self.layout,
            )
            self._terms.append(self.coefficient * term)

    def take(self) -> Tensor | None:
        """The sum of the terms since `begin`, with their graph; None where there are none."""
        terms, self._terms = self._terms, []
        if not terms:
            return None
        term = torch.stack(terms).sum()
        self.values.append(term.detach())
        return term


def sequence_balance(scores: Tensor, indices: Tensor, layout: SequenceLayout | None) -> Tensor:
    """`mean over documents of sum_e f_e P_e`, of `BalanceLoss`.

    Args:
        scores: `[T, E]`, positive.
        indices: `[T, K]` int64.
        layout: the documents; None is one.

    Returns:
        A scalar in the scores' dtype, differentiable in the scores.
    """
    (T, E), K = scores.shape, indices.shape[1]
    if layout is None:
        layout = SequenceLayout.from_lengths([T], scores.device)
    document = layout.seq_idx.long()  # [T]
    choices = _choices_of(indices, document, layout.num_documents, E)
    return _balance_of(scores, document, choices, K, layout)


def _choices_of(indices: Tensor, document: Tensor, documents: int, experts: int) -> Tensor:
    """`[D, E]` int64: how often each document chose each expert."""
    flat = (document[:, None] * experts + indices).flatten()
    choices = torch.zeros(documents * experts, dtype=torch.int64, device=flat.device)
    return choices.scatter_add_(0, flat, torch.ones_like(flat)).view(documents, experts)


def _balance_of(
    scores: Tensor, document: Tensor, choices: Tensor, K: int, layout: SequenceLayout
) -> Tensor:
    """The tokens' part of the balance of their documents.

    Args:
        scores: `[T, E]` of some tokens.
        document: `[T]` int64, the number of each token's document in the layout.
        choices: `[D, E]`, of all tokens of each document.
        K: experts a token.
        layout: of all documents.
    """
    lengths = layout.cu_seqlens.diff().to(scores.dtype)  # [D]
    f = choices * (scores.shape[1] / K / lengths.clamp(min=1))[:, None]
    share = scores / scores.sum(1, keepdim=True)
    # Summed token by token, so that no order of additions decides a gradient.
    of_token = (share * f.index_select(0, document)).sum(1) / lengths.index_select(0, document)
    return of_token.sum() / max(1, sum(n > 0 for n in layout.lengths))
