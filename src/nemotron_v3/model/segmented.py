"""Training and scoring in segments in time: sequences whose activations do not fit.

A Mamba-2 mixer hands on one state, and attention keys and values; nothing else of a token is needed
by the tokens behind it. So a sequence is computed segment by segment, and the gradient is exact: no
truncation, no approximation.

Letters: B batch, S sequence, T packed tokens.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.moe.load_balancing import BalanceInParts, BalanceLoss, check_balance
from nemotron_v3.layers.moe.router import repeating_contexts
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.segment_carry import SegmentCarry
from nemotron_v3.model.segments import Segment, cut
from nemotron_v3.model.whole_batch import WholeBatch

Where = Literal["device", "host"]


def segmented(
    model: NemotronV3ForCausalLM, tokens_per_segment: int, *, states: Where = "device"
) -> "Segmented":
    """A model that takes its sequences in segments in time, with the activations of one of them.

    The model itself is unchanged and can be called as ever.

    Args:
        model: on one device, or on several by its blocks; trained whole or by adapters. Gradient
            checkpointing acts within a segment, and is seldom needed then.
        tokens_per_segment: packed tokens of a segment, which may be of several documents. Each
            segment costs one more addition to the gradients of all parameters: give some thousands.
        states: where the states between segments are kept: on the model's device, or in the host's
            memory.

    Raises:
        TypeError: another kind of module.
        ValueError: a number of tokens below 1, another place, sharded parameters.
    """
    return Segmented(model, tokens_per_segment, states)


class Segmented:
    """See `segmented`.

        long = segmented(model, 65_536)
        loss = long.backward(input_ids, labels=input_ids)
        optimizer.step()

    Between the two passes over the segments are kept: of each mixer the states at each border, of
    each attention layer the keys and values of all tokens, then with their gradients in fp32 or
    wider, of each router the choices.
    """

    def __init__(self, model: NemotronV3ForCausalLM, tokens_per_segment: int, states: Where):
        if not isinstance(model, NemotronV3ForCausalLM):
            raise TypeError(
                f"segmented takes a NemotronV3ForCausalLM, got a {type(model).__name__}: give the "
                "model itself, without what is wrapped around it"
            )
        whole = isinstance(tokens_per_segment, int) and not isinstance(tokens_per_segment, bool)
        if not whole or tokens_per_segment < 1:
            raise ValueError(
                f"tokens_per_segment is {tokens_per_segment!r}: give a number of tokens above 0"
            )
        if states not in ("device", "host"):
            raise ValueError(f"states is {states!r}: keep them on the 'device' or the 'host'")
        for name, parameter in model.named_parameters():
            if type(parameter) not in (nn.Parameter, Tensor):
                raise ValueError(
                    f"{name} is a {type(parameter).__name__}: segments in time need the model's "
                    "whole parameters; make them before it is sharded or quantised"
                )
        self.model, self.tokens_per_segment, self.states = model, tokens_per_segment, states

    def backward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: SequenceLayout | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        balance: BalanceLoss | None = None,
        **layout_kwargs: Any,
    ) -> Tensor:
        """The loss, whose gradient is added to that of the parameters.

        As `model(...).loss.backward()`, except that the gradients of the segments are added up in
        fp32 or wider before they are rounded to the parameters' dtype.

        Args:
            input_ids: int64 `[B, S]`, or `[T]` without a batch dimension.
            attention_mask, labels, layout, position_ids, num_items_in_batch: as the model takes
                them; labels are needed.
            balance: a `BalanceLoss` of the model, whose loss is added, over whole documents; what
                its `take` returns afterwards has no graph, since its gradient is there already.
            **layout_kwargs: what `SequenceLayout.resolve` takes.

        Returns:
            The loss of the targets, a scalar in fp32 or wider, without a graph.

        Raises:
            ValueError, TypeError: what the model raises; no labels; nothing to train; attention
                dropout; a `BalanceLoss` that watches the model and is not given; hooks that want
                every gradient as it comes.
        """
        self._check_training(balance)
        about = {"layout": layout, "position_ids": position_ids, **layout_kwargs}
        work = self._work(input_ids, labels, attention_mask, num_items_in_batch, about)
        parts = nullcontext() if balance is None else balance.in_parts(work.batch.layout)
        with parts as in_parts, _collected(self.model):
            return self._there_and_back(work, in_parts)

    @torch.no_grad()
    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: SequenceLayout | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **layout_kwargs: Any,
    ) -> Tensor:
        """The loss alone; arguments and errors as in `backward`.

        Returns:
            A scalar in fp32 or wider, nats a target, without a graph.
        """
        about = {"layout": layout, "position_ids": position_ids, **layout_kwargs}
        work = self._work(input_ids, labels, attention_mask, num_items_in_batch, about)
        carry = SegmentCarry(work.batch.layout.num_tokens, keep=_nothing)
        losses = []
        for segment in work.segments:
            carry.begin(segment, in_graph=False)
            losses.append(self._pass(work, segment, carry, with_loss=True))
        return torch.stack(losses).sum()

    def _there_and_back(self, work: "_Work", balance: BalanceInParts | None) -> Tensor:
        keep = _to_host if self.states == "host" else _same
        carry = SegmentCarry(work.batch.layout.num_tokens, keep)
        contexts = [repeating_contexts() for _ in work.segments[:-1]]
        with torch.no_grad():
            for segment, (first, _) in zip(work.segments, contexts, strict=False):
                _begin(carry, balance, segment, in_graph=False)
                with first:
                    self._pass(work, segment, carry, with_loss=False)
        losses = []
        # The last segment is computed once: what lies behind it is nothing.
        again = [*(second for _, second in contexts), nullcontext()]
        for segment, second in zip(reversed(work.segments), reversed(again), strict=True):
            _begin(carry, balance, segment, in_graph=True)
            with torch.enable_grad():
                with second:
                    loss = self._pass(work, segment, carry, with_loss=True)
                term = None if balance is None else balance.take()
                carry.backward([loss] if term is None else [loss, term])
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _pass(
        self, work: "_Work", segment: Segment, carry: SegmentCarry, *, with_loss: bool
    ) -> Tensor:
        """The loss of a segment, or its hidden states."""
        out = self.model(
            work.batch.input_ids[segment.tokens],
            context=ForwardContext(segment.layout, carry=carry),
            targets=work.batch.targets[segment.tokens] if with_loss else None,
            num_items_in_batch=work.batch.items,
        )
        if with_loss:
            return out.loss
        (hidden,) = out.hidden_states
        return hidden

    def _work(self, *told: Any) -> "_Work":
        """The batch of which this is told, in segments."""
        batch = WholeBatch.read(self.model, *told)
        return _Work(batch, cut(batch.layout, self.tokens_per_segment))

    def _check_training(self, balance: BalanceLoss | None) -> None:
        model = self.model
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError("no parameter of the model requires a gradient: nothing is trained")
        check_balance(model, balance)
        for name, module in model.named_modules():
            if model.training and getattr(module, "attention_dropout", 0):
                raise ValueError(
                    f"{name}: attention_dropout is {module.attention_dropout}, and a segment that "
                    "is computed again would drop other weights: set it to 0, or call model.eval()"
                )
        for name, parameter in model.named_parameters():
            if getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise ValueError(
                    f"{name} has a hook that runs when its gradient is there, which would be once "
                    "a segment: step the optimiser after backward() instead"
                )


@dataclass(frozen=True)
class _Work:
    """A batch, and the segments that its tokens lie in."""

    batch: WholeBatch
    segments: list[Segment]


def _begin(
    carry: SegmentCarry, balance: BalanceInParts | None, segment: Segment, *, in_graph: bool
) -> None:
    carry.begin(segment, in_graph)
    if balance is not None:
        balance.begin(segment.layout, segment.tokens)


@contextmanager
def _collected(model: nn.Module) -> Iterator[None]:
    """Within it gradients add up in fp32 or wider; then they are those of the parameters, added to
    what was there. Where it is left by an error, those that were there stay as they were."""
    before: dict[nn.Parameter, Tensor | None] = {}
    sums: dict[nn.Parameter, Tensor] = {}

    def collect(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        if parameter in sums:
            sums[parameter] += gradient
        else:
            sums[parameter] = gradient.to(torch.promote_types(gradient.dtype, torch.float32))

    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                before[parameter], parameter.grad = parameter.grad, None
                hook = parameter.register_post_accumulate_grad_hook(collect)
                stack.callback(hook.remove)
        try:
            yield
        except BaseException:
            for parameter, gradient in before.items():
                parameter.grad = gradient
            raise
    for parameter, gradient in before.items():
        if parameter not in sums:
            parameter.grad = gradient
            continue
        total = sums.pop(parameter)
        if gradient is not None:
            total = total.add_(gradient)
        parameter.grad = total.to(parameter.dtype)


def _nothing(state: Tensor) -> Tensor:
    """Nobody comes back for a state."""
    return state.new_empty(0)


def _same(state: Tensor) -> Tensor:
    return state


def _to_host(state: Tensor) -> Tensor:
    """A copy in the host's memory, which the device makes in the order of its work."""
    if state.is_cpu:
        return state
    kept = torch.empty(state.shape, dtype=state.dtype, device="cpu", pin_memory=True)
    return kept.copy_(state, non_blocking=True)
