"""Context parallelism: the tokens of a batch, and of a document, over several processes.

A Mamba-2 mixer hands its state on, whose size does not grow with the tokens, and the last inputs of
its convolution; attention gathers keys and values. Nothing else of a token leaves its process.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.moe.load_balancing import BalanceLoss, check_balance
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.model.output import CausalLMOutput
from nemotron_v3.model.whole_batch import WholeBatch
from nemotron_v3.parallel.agreement import Disagreement, agree, joined
from nemotron_v3.parallel.context_carry import ContextCarry
from nemotron_v3.parallel.shares import Order, Shares, check_order
from nemotron_v3.parallel.token_group import share_tokens


def context_parallel(
    model: NemotronV3ForCausalLM, group: ProcessGroup | None = None, *, layout: Order = "auto"
) -> "ContextParallel":
    """A model whose tokens are shared by the processes of a group.

    Every process of the group calls this, and then the result, with the same arguments: the whole
    batch, of which it computes its share. The model may be sharded too, before this. Its layers can
    then be called by themselves with `cp_size` and `cp_rank` (`share_tokens`).

    Args:
        model: the same on all processes of the group.
        group: the processes; None is all of them.
        layout: "contiguous" gives a process one segment of the packed tokens, "zigzag" two, an
            early and a late one, so that all attend to as many pairs. "auto" chooses for each
            batch, by the lengths of its documents.

    Raises:
        TypeError: another kind of module.
        ValueError: an unknown layout, or this process is not in the group.
        RuntimeError: no process group.
    """
    if not isinstance(model, NemotronV3ForCausalLM):
        raise TypeError(
            f"context_parallel takes a NemotronV3ForCausalLM, got a {type(model).__name__}"
        )
    check_order(layout)
    if not dist.is_initialized():
        raise RuntimeError(
            "there is no process group to share tokens in: call "
            "torch.distributed.init_process_group first (torchrun starts the processes)"
        )
    chosen = dist.group.WORLD if group is None else group
    if not isinstance(chosen, ProcessGroup):
        raise ValueError("this process is not in the context-parallel group: give its own group")
    return ContextParallel(model, chosen, layout)


class ContextParallel:
    """See `context_parallel`.

        shared = context_parallel(model, group)
        loss = shared(input_ids, labels=input_ids)
        loss.backward()
        shared.sum_gradients_()
        print(shared.total(loss))

    Attributes:
        model: whose parameters are trained.
        group: the processes that share each batch.
        layout: how its tokens go to them.
    """

    def __init__(
        self,
        model: NemotronV3ForCausalLM,
        group: ProcessGroup,
        layout: Order,
        *,
        call: Callable[..., CausalLMOutput] | None = None,
        together: ProcessGroup | None = None,
    ):
        """
        Args:
            call: computes a share in place of the model's own call.
            together: the processes that are in a pass at once, through the hosts: where one of them
                cannot be, all raise. None is the group.
        """
        self.model, self.group, self.layout = model, group, layout
        self._shared = share_tokens(model, group, layout)
        self._call = call or model
        self._together = together or _through_hosts(group)
        self._team = dist.get_process_group_ranks(group)[0]

    def __call__(
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
        """This process's part of the loss: the sum over its targets, divided by the number of all.

        The sum over the group is the loss, and the sum of the gradients its gradient.

        Args:
            input_ids: int64 `[B, S]`, or `[T]` without a batch dimension: the whole batch.
            attention_mask, labels, layout, position_ids, num_items_in_batch: as the model takes
                them, of the whole batch; labels are needed.
            balance: a `BalanceLoss` of the model, whose loss is added, over whole documents; what
                its `take` returns afterwards has no graph, and is this process's part.
            **layout_kwargs: what `SequenceLayout.resolve` takes.

        Returns:
            A scalar in fp32 or wider; 0, with a graph, on a process without targets.

        Raises:
            ValueError, TypeError: what the model raises; no labels; a `BalanceLoss` that watches
                the model and is not given. Where one process raises, all do.
            Disagreement: processes that were given different batches.
        """
        about = {"layout": layout, "position_ids": position_ids, **layout_kwargs}
        told = (labels, attention_mask, num_items_in_batch, about)
        return self.part(None, balance, input_ids, *told)

    def part(self, problem: str | None, balance: BalanceLoss | None, *told: Any) -> Tensor:
        """What a call returns, of what `WholeBatch.read` takes; `problem` is what the caller has
        found wrong, which all are then told."""
        said, error, work = {}, None if problem is None else ValueError(problem), None
        try:
            if error is None:
                check_balance(self.model, balance)
                work = self._work(*told)
                said = _described(*work, self.layout)
        except (ValueError, TypeError) as found:
            error = found
        try:
            problem = None if error is None else str(error)
            what = "the same batch"
            agree(problem, said, self._together, team=self._team, what=what)
        except Disagreement:
            raise
        except ValueError as same:  # of all: this process's own tells more
            raise (error or same) from None
        if work is None:
            raise AssertionError("a problem is everyone's")
        shares, batch = work
        context = ForwardContext(shares.local, carry=ContextCarry(shares, self.group))
        if balance is None:
            return self._loss(batch, context, shares)
        with balance.in_parts(shares.layout, self._sum_) as parts:
            parts.begin(shares.local, shares.index)
            loss = self._loss(batch, context, shares)
            term = parts.take()
        return loss if term is None else loss + term

    def total(self, loss: Tensor) -> Tensor:
        """The sum of a number over the group, without a graph."""
        return self._sum_(loss.detach().clone())

    @torch.no_grad()
    def sum_gradients_(self) -> None:
        """Add up the gradients of all processes of the group, in place: for a model that nothing
        else sums up (FSDP2 and DDP do)."""
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:  # all take part, whatever they had to do
                    parameter.grad = torch.zeros_like(parameter)
                self._sum_(parameter.grad)

    def _loss(self, batch: WholeBatch, context: ForwardContext, shares: Shares) -> Tensor:
        """Of this process's tokens, which are cut after the labels were shifted."""
        ids, targets = (t.index_select(0, shares.index) for t in (batch.input_ids, batch.targets))
        out = self._call(ids, context=context, targets=targets, num_items_in_batch=batch.items)
        assert out.loss is not None
        return out.loss

    def _sum_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _work(self, *told: Any) -> tuple[Shares, WholeBatch]:
        batch = WholeBatch.read(self.model, *told)
        return self._shared.shares(batch.layout), batch


def _through_hosts(group: ProcessGroup) -> ProcessGroup:
    """A group of the same processes that speaks through the hosts."""
    if dist.get_backend(group) == "gloo":
        return group
    ranks = dist.get_process_group_ranks(group)
    return joined(dist.new_group(ranks, backend="gloo", use_local_synchronization=True))


def _described(shares: Shares, batch: WholeBatch, layout: str) -> dict[str, str]:
    """What the processes of a group have to have in common; short, it is sent in every step.

    Tokens on a device are not looked at: the host would wait for it.
    """
    lengths = ",".join(map(str, shares.layout.lengths))
    said = {
        "the layout": layout,
        "the number of tokens": str(shares.layout.num_tokens),
        "the documents' lengths": _digest(lengths.encode()),
    }
    if batch.input_ids.is_cpu:
        said["the tokens"] = _digest(batch.input_ids.numpy().tobytes())
    return said


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
