"""What processes of a context-parallel group do in the tests: their share against the whole."""

import copy
import pickle
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemotron_v3 import SequenceLayout
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.moe.load_balancing import BalanceLoss
from nemotron_v3.parallel import Plan, collectives, parallelize
from nemotron_v3.parallel.agreement import Disagreement
from nemotron_v3.parallel.context import context_parallel
from nemotron_v3.parallel.context_carry import ContextCarry
from nemotron_v3.parallel.costs import gathered_keys, mixer_bytes
from nemotron_v3.parallel.shares import Shares
from nemotron_v3.parallel.token_group import share_tokens
from tests.models import tiny_model, tokens
from tests.parallel.heads import all_to_all_over_heads

EXACT = 1e-12  # of each tensor's largest entry, in fp64
# Whole documents; one that begins where another's segment ends; one-token documents and one over
# all; fewer tokens than segments; documents shorter than the convolution; odd lengths.
PACKS = ([40], [13, 28], [1] * 5 + [30], [3], [2, 2, 3, 1, 2, 2, 21], [0, 9, 0, 8])


def cases() -> Iterator[tuple[list[int], str]]:
    for lengths in PACKS:
        for order in ("contiguous", "zigzag"):
            yield lengths, order


def close(found: Tensor, wanted: Tensor, what: str, allowed: float = EXACT) -> None:
    assert found.shape == wanted.shape, what
    if wanted.numel():
        error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-9)
        assert error <= allowed, f"{what}: {float(error):.1e}"


def mixers(rank: int) -> None:
    """A mixer and attention alone: their outputs and all gradients."""
    torch.set_default_dtype(torch.float64)
    model = tiny_model("M*").double()
    for lengths, order in cases():
        for name, layer in (("mamba", model.model.layers[0]), ("attention", model.model.layers[1])):
            _layer(layer, lengths, order, f"{name} {lengths} {order}")


def _layer(layer: nn.Module, lengths: list[int], order: Any, what: str) -> None:
    random = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(lengths), 48, generator=random) for _ in range(2))
    layout = SequenceLayout.from_lengths(lengths)
    shares = Shares.of(layout, dist.get_world_size(), dist.get_rank(), order)
    carry = ContextCarry(shares, dist.group.WORLD)
    own = x[shares.index].requires_grad_()
    y = layer(own, context=ForwardContext(shares.local, carry=carry))
    y.backward(dy[shares.index])
    found = {n: p.grad for n, p in layer.named_parameters()}
    layer.zero_grad()
    whole = x.clone().requires_grad_()
    wanted = layer(whole, layout=layout)
    wanted.backward(dy)
    close(y, wanted[shares.index], f"{what}: y")
    close(own.grad, whole.grad[shares.index], f"{what}: dx")
    for n, p in layer.named_parameters():
        dist.all_reduce(found[n])
        close(found[n], p.grad, f"{what}: d{n}")
    layer.zero_grad()


def models(rank: int) -> None:
    """The model: loss, every gradient, the balance loss; with checkpointing too."""
    torch.set_default_dtype(torch.float64)
    model = tiny_model("ME*-M").double().train()
    ids = {n: tokens(n) for n in {sum(lengths) for lengths in PACKS}}
    for i, (lengths, order) in enumerate(cases()):
        own = ids[sum(lengths)]
        layout = SequenceLayout.from_lengths(lengths)
        batch: dict[str, Any] = {"input_ids": own, "labels": own, "layout": layout}
        _model(copy.deepcopy(model), batch, order, bool(i % 3), f"{lengths} {order}")


def _model(model: Any, batch: dict[str, Any], order: Any, recompute: bool, what: str) -> None:
    with BalanceLoss(model, 0.1) as balance:
        loss = model(**batch).loss + balance.take()
        loss.backward()
        wanted = {n: p.grad for n, p in model.named_parameters()}
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable()
        shared = context_parallel(model, layout=order)
        part = shared(**batch, balance=balance)
        part.backward()
        shared.sum_gradients_()
    close(shared.total(part), loss.detach(), f"{what}: loss")
    for n, p in model.named_parameters():
        close(p.grad, wanted[n], f"{what}: d{n}")


def isolated(rank: int) -> None:
    """Another document, other tokens: the rest is equal bit for bit; and so are two runs."""
    torch.set_default_dtype(torch.float32)
    layer = tiny_model("M*").model.layers
    random = torch.Generator().manual_seed(0)
    x = torch.randn(41, 48, generator=random)
    for order in ("contiguous", "zigzag"):
        layout = SequenceLayout.from_lengths([13, 15, 13])
        shares = Shares.of(layout, dist.get_world_size(), dist.get_rank(), order)
        for block in layer:
            changed = x.clone()
            changed[13:28] += 1
            y, again, other = (_out(block, part, shares) for part in (x, x, changed))
            assert all(torch.equal(a, b) for a, b in zip(y, again, strict=True))
            rest = (shares.index < 13) | (shares.index >= 28)
            assert all(torch.equal(a[rest], b[rest]) for a, b in zip(y, other, strict=True))


def _out(block: nn.Module, x: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    carry = ContextCarry(shares, dist.group.WORLD)
    own = x[shares.index].requires_grad_()
    y = block(own, context=ForwardContext(shares.local, carry=carry))
    (dx,) = torch.autograd.grad(y.sum(), own)
    return y.detach(), dx


def disagreeing(rank: int) -> None:
    """Whoever is told something else, all processes say so; none waits."""
    model = tiny_model("M*")
    ids = tokens(20)
    shared = context_parallel(model)
    lengths = [5, 15] if rank else [6, 14]
    with pytest.raises(Disagreement, match="the documents' lengths"):
        shared(ids, labels=ids, layout=SequenceLayout.from_lengths(lengths))
    with pytest.raises(ValueError, match="rank 0: labels are missing"):
        shared(ids, labels=ids if rank else None)
    other = context_parallel(model, layout="zigzag" if rank else "contiguous")
    with pytest.raises(Disagreement, match="the layout"):
        other(ids, labels=ids)
    assert bool(shared(ids, labels=ids).isfinite())


def planned(rank: int) -> None:
    """What one process of a plan cannot do, all hear of, whatever batch they share."""
    size = dist.get_world_size()
    with pytest.raises(Disagreement, match="rank 1 has the plan = .*cp_layout='zigzag'"):
        parallelize(tiny_model("M*"), Plan(cp=2, cp_layout="zigzag" if rank == 1 else "auto"))
    with pytest.raises(ValueError, match=rf"cp = 3 times .* does not divide the {size} processes"):
        parallelize(tiny_model("M*"), Plan(cp=3))
    with pytest.raises(ValueError, match="a NemotronV3Model has not"):
        parallelize(tiny_model("M*").model, Plan(cp=2))
    model = parallelize(tiny_model("M*").double(), Plan(cp=2))
    ids = tokens(20, seed=rank // 2)
    other = tokens(20, seed=7)
    with pytest.raises(Disagreement, match="same batch: rank 1 has the tokens"):
        model(other if rank == 1 else ids, labels=ids)
    with pytest.raises(ValueError, match="rank 3: use_cache, logits_to_keep: a process of a plan"):
        told = {"use_cache": True, "logits_to_keep": 1} if rank == 3 else {}
        model(ids, labels=ids, **told)
    with pytest.raises(ValueError, match="labels are missing"):
        model(ids)
    with pytest.raises(ValueError, match="counted several times"):
        model.score(ids)
    alone = tiny_model("M*").double()
    with torch.no_grad():
        parts = model(ids, labels=ids).loss
        dist.all_reduce(parts)
        batches = [alone(t, labels=t).loss for t in (tokens(20, seed=g) for g in range(size // 2))]
        close(parts, torch.stack(batches).sum(), "the loss")


def documented(rank: int) -> None:
    """A layer that was given a group is called with cp_size and cp_rank, and the offsets of all."""
    torch.set_default_dtype(torch.float64)
    size = dist.get_world_size()
    x = torch.randn(1, 22, 48, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 9, 22])
    for block in tiny_model("M*E").double().model.layers:
        wanted = block.mixer(x, cu_seqlens=offsets)
        with pytest.raises(ValueError, match="no context-parallel group"):
            block.mixer(x, cu_seqlens=offsets, cp_size=size, cp_rank=rank)
        shares = share_tokens(block, dist.group.WORLD, "zigzag").shares(
            SequenceLayout.from_lengths([9, 13])
        )
        own = x[:, shares.index]
        told = {"cp_size": size, "cp_rank": rank}
        y = block.mixer(own, cu_seqlens=offsets, **told)
        close(y, wanted[:, shares.index], "a call of a mixer")
        y = block(own, cu_seqlens=offsets, cp_size=size)
        close(y, block(x, cu_seqlens=offsets)[:, shares.index], "a call of a block")
        for wrong, message in (
            ({"cu_seqlens": offsets, "cp_size": size + 1}, "the layer's group has"),
            ({"cu_seqlens": offsets, **told, "cp_rank": rank + 1}, "this is number"),
            (told, "need cu_seqlens or a layout of all"),
            ({"cu_seqlens": torch.tensor([0, 9, 40]), **told}, "give those, packed"),
        ):
            with pytest.raises(ValueError, match=message):
                block.mixer(own, **wrong)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(block.mixer)))
        assert copied.token_group is None


def sending(rank: int) -> None:
    """A mixer sends the same number of bytes, however many tokens there are; heads that go to their
    processes, and attention's keys and values, send as many as there are tokens."""
    torch.set_default_dtype(torch.float32)
    model, R = tiny_model("M*"), dist.get_world_size()
    mixer, attention = model.model.layers
    states = mixer_bytes(model.config, 4)
    for order, segments in (("contiguous", 1), ("zigzag", 2)):
        counted = {n: _bytes_sent(mixer, n, order) for n in (1024, 65_536)}
        assert counted[1024] == counted[65_536] == states.sent(R, segments)
    for n in (1024, 4096):
        sent = _bytes_sent(attention, n, "contiguous")
        assert sent == 4 * gathered_keys(model.config, n // R, R)
        of_heads = _bytes_of_heads(model.config, n // R)
        assert of_heads == all_to_all_over_heads(model.config, n // R, 4, R)


def _bytes_sent(mixer: nn.Module, length: int, order: Any) -> int:
    """Of a pass and its way back, what this process sends to others."""
    layout = SequenceLayout.from_lengths([length])
    shares = Shares.of(layout, dist.get_world_size(), dist.get_rank(), order)
    own = torch.randn(len(shares.index), 48).requires_grad_()
    carry = ContextCarry(shares, dist.group.WORLD)
    with Recording() as recording:
        y = mixer(own, context=ForwardContext(shares.local, carry=carry))
        y.sum().backward()
    return recording.bytes


def _bytes_of_heads(config: Any, tokens: int) -> int:
    """What it sends where each process has all tokens of some heads instead, and their groups."""
    R, H, P = dist.get_world_size(), config.mamba_num_heads, config.mamba_head_dim
    groups = max(1, config.n_groups // R)  # of those of a process's heads
    each = (2 * P * H + H) // R + 2 * groups * config.ssm_state_size  # z, x, dt; B, C
    with Recording() as recording:
        for width in (each, H * P // R) * 2:  # into the scan and out of it, and their gradients
            collectives.exchanged(torch.zeros(R * tokens, width), dist.group.WORLD)
    return recording.bytes


class Recording:
    """Within it the bytes are counted that collectives send to other processes."""

    def __enter__(self) -> "Recording":
        self.bytes = 0
        self.patch = pytest.MonkeyPatch()
        size = dist.get_world_size()
        to_each = {"_all_gather": size - 1, "all_to_all_single": (size - 1) / size}
        for name, times in to_each.items():
            owner = collectives if name == "_all_gather" else dist
            counting = partial(self._count, getattr(owner, name), times)
            self.patch.setattr(owner, name, counting)
        return self

    def _count(self, function: Any, times: float, out: Tensor, x: Tensor, *rest: Any, **told: Any):
        self.bytes += round(x.nbytes * times)
        return function(out, x, *rest, **told)

    def __exit__(self, *_: Any) -> None:
        self.patch.undo()
