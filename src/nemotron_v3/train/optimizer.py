"""AdamW for weights in fp32 and bfloat16, with moments of 8 bits, and the choice of optimisers."""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from nemotron_v3.model.optim import hidden_matrices, parameter_groups
from nemotron_v3.train.options import OptimizerOptions
from nemotron_v3.train.rounding import round_stochastically_, rounding_key
from nemotron_v3.train.update import Update, update_, update_numbers

BUCKET = 2**26  # elements that are updated at once: 256 MiB in fp32 beside the weights


def make_optimizer(model: nn.Module, options: OptimizerOptions, seed: int) -> torch.optim.Optimizer:
    """The optimiser of a model's trainable parameters; made after they were sharded.

    Raises:
        ValueError: moments of 8 bits with fp32 masters, or without torchao.
    """
    groups = parameter_groups(model, options.weight_decay)
    if options.kind == "muon":
        groups = _matrices_apart(groups, hidden_matrices(model))
    groups = [group for group in groups if group["params"]]
    common: dict[str, Any] = {"lr": options.learning_rate, "betas": options.betas}
    narrow = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    kind = RoundedAdamW
    if options.kind == "muon":
        from nemotron_v3.train.muon import Muon

        kind = functools.partial(Muon, momentum=options.momentum)
    elif options.moments == "8bit":
        from nemotron_v3.train.eight_bit import EightBitAdamW as kind

        if narrow and options.bf16_weights == "master":
            raise ValueError(
                "optimizer.moments = '8bit' saves memory and bf16_weights = 'master' spends it: "
                "give bf16_weights = 'stochastic'"
            )
    elif not narrow:
        # PyTorch updates tensors of several meshes one by one alone.
        meshes = {getattr(p, "device_mesh", None) for group in groups for p in group["params"]}
        fused = len(meshes) == 1
        return torch.optim.AdamW(groups, **common, eps=options.eps, fused=fused, foreach=False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return kind(
        groups, **common, eps=options.eps, rounding=options.bf16_weights, names=names, seed=seed
    )


def _matrices_apart(
    groups: list[dict[str, Any]], matrices: list[nn.Parameter]
) -> list[dict[str, Any]]:
    """The groups without these parameters, which have one of their own with the first's decay."""
    apart = set(matrices)
    rest = [g | {"params": [p for p in g["params"] if p not in apart]} for g in groups]
    return [groups[0] | {"params": matrices, "matrices": True}, *rest]


class RoundedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) whose arithmetic and moments are fp32
    where weights are bfloat16.

    Args:
        params: as every optimiser takes them.
        rounding: how an updated weight becomes bfloat16 again. "stochastic" rounds at random, keyed
            by `names`, element and step; "nearest" loses small updates; "master" keeps the weights
            in fp32 too and rounds a copy of them.
        names: of the parameters.
        seed: another one rounds otherwise.

    Attributes:
        scale: every gradient is multiplied by it as it is read, which shortens a long one without a
            pass over all of them.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        rounding: str,
        names: dict[nn.Parameter, str],
        seed: int = 0,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.rounding: str = rounding
        self.seed: int = seed
        self.scale: float = 1.0
        self._names = names

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what `state_dict()` gave, each tensor in its own dtype: PyTorch's own method casts
        moments to the weights'."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for p, number in zip(group["params"], saved["params"], strict=True):
                if number in state_dict["state"]:
                    self.state[p] = dict(state_dict["state"][number])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for bucket in _buckets(p for p in group["params"] if p.grad is not None):
                self._update(group, bucket)

    def _update(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> None:
        on_gpu: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for p in bucket:
            local = local_part(p)
            by_kernel = local.is_cuda and local.is_contiguous() and _first_element(p) is not None
            (on_gpu if by_kernel else others).append(p)
        if on_gpu:
            self._update_on_gpu(group, on_gpu)
        if others:
            self._update_widened(group, others)

    def _update_on_gpu(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> None:
        """By a kernel for each parameter."""
        states = [self._state_of(p) for p in bucket]
        torch._foreach_add_([state["step"] for state in states], 1)  # pyright: ignore[reportPrivateImportUsage]
        told = [self._told(group, p, state) for p, state in zip(bucket, states, strict=True)]
        update_([update for update in told if update.weight.numel()])

    def _told(self, group: dict[str, Any], p: nn.Parameter, state: dict[str, Any]) -> Update:
        assert p.grad is not None
        at_random = self.rounding == "stochastic" and p.dtype == torch.bfloat16
        return Update(
            weight=local_part(p),
            gradient=local_part(p.grad),
            exp_avg=local_part(state["exp_avg"]),
            exp_avg_sq=local_part(state["exp_avg_sq"]),
            master=local_part(state["master"]) if "master" in state else None,
            numbers=update_numbers(group, state["count"], self.scale),
            key=self._key(p) if at_random else None,
            first=_first_element(p) or 0,
        )

    def _update_widened(self, group: dict[str, Any], bucket: list[nn.Parameter]) -> None:
        """By PyTorch's update of fp32 weights."""
        states = [self._state_of(p) for p in bucket]
        weights = [
            local_part(state.get("master", p)).float()
            for p, state in zip(bucket, states, strict=True)
        ]
        adamw(
            weights,
            [_gradient(p, self.scale) for p in bucket],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )
        for p, weight in zip(bucket, weights, strict=True):
            self._write(p, weight)

    def _state_of(self, p: nn.Parameter) -> dict[str, Any]:
        state = self.state[p]
        if not state:
            state.update(self._new_state(p))
        state["count"] += 1
        return state

    def _new_state(self, p: nn.Parameter) -> dict[str, Any]:
        # Counted on the host too, for the key: AdamW's other one is on the device.
        state = self._moments(p) | {"count": 0}
        if self.rounding == "master" and p.dtype == torch.bfloat16:
            state["master"] = p.detach().float()
        return state

    def _moments(self, p: nn.Parameter) -> dict[str, Any]:
        """Of a parameter that was not moved yet."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, dtype=torch.float32),
            "exp_avg_sq": torch.zeros_like(p, dtype=torch.float32),
        }

    def _write(self, p: nn.Parameter, weight: Tensor) -> None:
        local = local_part(p)
        if self.rounding != "stochastic" or p.dtype != torch.bfloat16:
            if weight is not local and weight.data_ptr() != local.data_ptr():
                local.copy_(weight)
            return
        for part, values, first in _runs(p, local, weight):
            round_stochastically_(part, values, self._key(p), first)

    def _key(self, p: nn.Parameter) -> int:
        return rounding_key(self._names[p], self.state[p]["count"], self.seed)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        numel = local_part(parameter).numel()
        if bucket and size + numel > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += numel
    if bucket:
        yield bucket


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gradient(p: nn.Parameter, scale: float) -> Tensor:
    """What this process holds of a parameter's gradient times `scale`, in fp32."""
    if p.grad is None:
        raise ValueError("a parameter without a gradient is not updated")
    gradient = local_part(p.grad).float()
    return gradient if scale == 1.0 else gradient * scale


def _first_element(p: Tensor) -> int | None:
    """The number of the first element that this process holds in the order of the whole tensor's;
    None where what it holds is no run in that order."""
    if not isinstance(p, DTensor):
        return 0
    local = p.to_local()
    if not local.numel():
        return 0
    if p.dim() > 1 and local.shape[1:] != p.shape[1:]:
        return None
    return next(first for _, _, first in _runs(p, local, local))


def _runs(p: Tensor, local: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
    """What this process holds of a tensor and its new values, in runs that are whole in the order
    of the tensor's elements; and the number of each run's first element in that order."""
    if not isinstance(p, DTensor):
        yield local, values, 0
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    assert tuple(shape) == tuple(local.shape), f"{shape} and {tuple(local.shape)} are of one part"
    assert not any(offset[2:]), "a tensor is sharded along its first two dimensions alone"
    after = [math.prod(p.shape[dim + 1 :]) for dim in range(p.dim())]
    if not local.numel():
        return
    if p.dim() < 2 or shape[1] == p.shape[1]:
        yield local, values, offset[0] * after[0]
        return
    for row in range(shape[0]):
        first = (offset[0] + row) * after[0] + offset[1] * after[1]
        yield local[row], values.view_as(local)[row], first
