"""A model spread over processes against the same model in one: loss, gradients, parameters."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemotron_v3 import NemotronV3ForCausalLM, SequenceLayout
from nemotron_v3.layers.moe.routing_replay import record_routing, replay_routing
from nemotron_v3.parallel import Plan, by_mesh, clip_gradients_, gradient_norm, parallelize
from nemotron_v3.parallel.shares import Shares
from tests.models import disturb, tiny_model

# Documents of each pass of a group that shares tokens: one-token documents and one over all; fewer
# tokens than segments, so that processes have none; documents shorter than the convolution, and
# documents without a token.
PACKS = ([1] * 5 + [30], [3], [2, 2, 3, 0, 1, 2, 21])
LENGTHS = (23, 9, 0, 17, 5, 31, 2, 12)  # tokens of each process; one has none
FEW = {"n_routed_experts": 8, "num_experts_per_tok": 6}  # of 97 words, which nothing divides
MANY = {"n_routed_experts": 32, "num_experts_per_tok": 22, "vocab_size": 96}


@dataclass(frozen=True)
class Case:
    """One plan and model; `lora` is the rank of updates beside frozen experts, 0 for none."""

    plan: Plan
    config: dict[str, Any] = field(default_factory=lambda: FEW)
    dtype: torch.dtype = torch.float64
    lora: int = 0
    checkpointing: bool = False
    pattern: str = "ME*E"

    @property
    def allowed(self) -> float:
        return 1e-12 if self.dtype == torch.float64 else 1e-5

    def model(self) -> NemotronV3ForCausalLM:
        model = tiny_model(self.pattern, **self.config).to(self.dtype)
        if self.lora:
            for block in model.model.layers:
                if block.block_type == "moe":
                    block.mixer.experts.requires_grad_(False)
                    low_rank = block.mixer.experts.add_low_rank(self.lora)
                    disturb(low_rank, torch.Generator().manual_seed(1))
        return model

    @property
    def passes(self) -> int:
        """Of a step; a group of processes that share tokens has other documents in each."""
        return len(PACKS) if self.plan.cp > 1 else 1

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        groups = by_mesh([{"params": [p for p in model.parameters() if p.requires_grad]}])
        if self.dtype == torch.float64:
            # A first step divides a gradient by its size: with a small eps one that is 0 but for
            # rounding would become a whole step.
            return torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
        return torch.optim.SGD(groups, lr=1e-2)


def documents(case: Case, group: int, number: int) -> list[int]:
    """Of a group's pass: two documents, or none, where each process is one."""
    if case.plan.cp > 1:
        return PACKS[(number + group) % len(PACKS)]
    first = LENGTHS[group] // 3
    return [first, LENGTHS[group] - first]


def batch_of(case: Case, group: int, number: int) -> dict[str, Any]:
    """Its tokens."""
    lengths = documents(case, group, number)
    generator = torch.Generator().manual_seed(100 + 10 * group + number)
    ids = torch.randint(0, 96, (sum(lengths),), generator=generator)
    layout = SequenceLayout.from_lengths(lengths)
    return {"input_ids": ids, "labels": ids.clone(), "layout": layout}


def targets(case: Case, groups: int) -> int:
    """Of all processes: each document's tokens but its first."""
    each = [documents(case, g, i) for g in range(groups) for i in range(case.passes)]
    return sum(max(0, n - 1) for lengths in each for n in lengths)


@dataclass
class Outcome:
    """What a step computed, whole tensors by name."""

    loss: Tensor
    norm: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def step(
    case: Case, model: NemotronV3ForCausalLM, losses: Callable[[], Tensor], longest: float
) -> Outcome:
    """Gradients, their norm, and the parameters after a clipped step."""
    optimizer = case.optimizer(model)
    loss = losses()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    gradients = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    norm = gradient_norm(trained)
    clip_gradients_(trained, longest, norm)
    optimizer.step()
    return Outcome(loss, norm, gradients, {n: whole(p) for n, p in model.named_parameters()})


def compare(case: Case) -> None:
    """Hold a case to its bound, twice, in the processes that are there."""
    rank, groups = dist.get_rank(), dist.get_world_size() // case.plan.cp
    items = targets(case, groups)
    alone, routes = case.model(), []
    alone.train()

    def of_all() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for number, group in product(range(case.passes), range(groups)):
            with record_routing(alone) as record:
                loss = alone(**batch_of(case, group, number), num_items_in_batch=items).loss
            loss.backward()
            routes.append(record)
            total += loss.detach()
        return total

    # Half of the norm, so that clipping has something to do.
    of_all()
    longest = float(gradient_norm(p for p in alone.parameters() if p.requires_grad)) / 2
    alone.zero_grad()
    routes.clear()
    true = step(case, alone, of_all, longest)
    found = [_spread(case, routes[rank // case.plan.cp :: groups], longest) for _ in range(2)]
    _hold(case, found[0], true)
    for name, first in _tensors(found[0]).items():
        assert torch.equal(first, _tensors(found[1])[name]), f"{name} differs between two runs"


def _spread(case: Case, routes: list[Any], longest: float) -> Outcome:
    model = parallelize(case.model(), case.plan)
    if case.checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    group, place = divmod(dist.get_rank(), case.plan.cp)
    items = targets(case, dist.get_world_size() // case.plan.cp)

    def of_mine() -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for number, route in enumerate(routes):
            batch = batch_of(case, group, number)
            shares = Shares.of(batch["layout"], case.plan.cp, place, case.plan.cp_layout)
            own = {n: [c[shares.index] for c in calls] for n, calls in route.indices.items()}
            with replay_routing(model, own):
                loss = model(**batch, num_items_in_batch=items).loss
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        return total

    return step(case, model, of_mine, longest)


def _tensors(outcome: Outcome) -> dict[str, Tensor]:
    gradients = {f"grad {name}": tensor for name, tensor in outcome.gradients.items()}
    return {"loss": outcome.loss, "norm": outcome.norm, **gradients, **outcome.parameters}


def _hold(case: Case, found: Outcome, true: Outcome) -> None:
    measured, expected = _tensors(found), _tensors(true)
    assert measured.keys() == expected.keys(), measured.keys() ^ expected.keys()
    wrong = {}
    for name, tensor in expected.items():
        largest = float(tensor.abs().max()) or 1.0
        error = float((measured[name].double() - tensor.double()).abs().max()) / largest
        if not error <= (1e-6 if name == "norm" else case.allowed):
            wrong[name] = error
    assert not wrong, f"{case}: {wrong}"
