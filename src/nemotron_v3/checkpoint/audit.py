"""Proof that a model's tensors are those of a checkpoint.

A load keeps a `Ledger`: with it, and with a plan that maps the file's tensors one to one, it
proves that every parameter and buffer holds what was copied from the file and nothing else, without
reading anything twice. `audit` compares a model with a file at any later time, bit by bit.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.names import LoadReport
from nemotron_v3.checkpoint.narrow import layouts as stored_narrow
from nemotron_v3.checkpoint.narrow.hold import empty_like, fill_narrow, holds
from nemotron_v3.checkpoint.narrow.read import row_blocks
from nemotron_v3.checkpoint.plan import Fill, Plan, plan_load, tensors_of
from nemotron_v3.checkpoint.reader import Checkpoint, open_checkpoint
from nemotron_v3.checkpoint.writer import blocks, same_bits, same_values
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.layers.narrow import NarrowWeight
from nemotron_v3.model.dtypes import memory_dtype
from nemotron_v3.model.model import NemotronV3ForCausalLM


@dataclass
class _Account:
    """A tensor being filled; `writes` counts the copies into each expert of it, or (None) into all
    of it, and `version` is torch's count of writes when it went into the model."""

    tensor: Tensor
    writes: Counter[int | None] = field(default_factory=Counter)
    version: int = -1


class Ledger:
    """The tensors of a model while a checkpoint fills them, counting what was written where."""

    def __init__(
        self,
        shapes: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
        narrow: Mapping[str, stored_narrow.StoredNarrow] | None = None,
    ):
        self._shapes = {name: tensor.shape for name, tensor in shapes.items()}
        self._dtype = dtype
        self._device = device
        self._narrow = narrow or {}
        self._accounts: dict[str, _Account] = {}

    def write(self, fill: Fill, checkpoint: Checkpoint) -> None:
        """Bring a weight to where `fill` says, rounded once, on the device."""
        name = fill.memory
        if name not in self._accounts:
            self._accounts[name] = _Account(self._empty(name, checkpoint))
        account = self._accounts[name]
        account.writes[fill.expert] += 1
        if isinstance(account.tensor, NarrowWeight):
            weight = checkpoint.narrow.weights[fill.disk]
            fill_narrow(account.tensor, checkpoint.stored, weight, fill.expert)
            return
        target = account.tensor if fill.expert is None else account.tensor[fill.expert]
        checkpoint.copy_to(fill.disk, target)

    def _empty(self, name: str, checkpoint: Checkpoint) -> Tensor:
        shape, dtype = self._shapes[name], memory_dtype(name, self._dtype)
        if name in self._narrow:
            like = self._narrow[name]
            return empty_like(like, checkpoint.stored, shape, dtype, self._device)
        return torch.empty(shape, dtype=dtype, device=self._device)

    def install(self, model: nn.Module) -> None:
        """Put the filled tensors in the place of the model's; parameters keep their attributes."""
        for name, account in self._accounts.items():
            owner, _, leaf = name.rpartition(".")
            module = model.get_submodule(owner)
            old = getattr(module, leaf)
            if isinstance(old, nn.Parameter):
                trained = old.requires_grad and not isinstance(account.tensor, NarrowWeight)
                account.tensor = nn.Parameter(account.tensor, requires_grad=trained)
                vars(account.tensor).update(vars(old))
            setattr(module, leaf, account.tensor)
            account.version = _version(account.tensor)

    def prove(self, model: nn.Module) -> None:
        """Raise `CheckpointError`, listing them, where a tensor of the model, transient buffers
        included, was not filled, filled in part or twice, exchanged, or written to since."""
        problems = []
        held = dict(model.named_parameters()) | dict(model.named_buffers())
        for name, tensor in held.items():
            account = self._accounts.get(name)
            if account is None:
                problems.append(f"{name} was not filled")
                continue
            experts = range(tensor.shape[0]) if None not in account.writes else [None]
            if account.writes != Counter(experts):
                problems.append(f"{name} was filled in part, or twice")
            if tensor is not account.tensor:
                problems.append(f"{name} is not the tensor that was filled")
            elif _version(tensor) != account.version:
                problems.append(f"{name} was written to after it was filled")
        problems += [f"{name} is not in the model" for name in self._accounts.keys() - held.keys()]
        if problems:
            raise CheckpointError("the load cannot be proven", problems)


def _version(tensor: Tensor) -> int:
    """torch's count of writes, of the tensors that a narrow weight is held in."""
    if isinstance(tensor, NarrowWeight):
        return sum(part._version for part in tensor.parts if part is not None)
    return tensor._version


@torch.no_grad()
def audit(model: NemotronV3ForCausalLM, path: str | os.PathLike[str]) -> LoadReport:
    """Read the checkpoint in `path` again and compare every parameter, buffer and carried tensor of
    `model` with it, bit for bit after the one cast from the file's dtype to the model's.

    A model of some of the layers is compared with those layers. Raises `CheckpointError` listing
    every tensor that is missing, extra, mis-shaped, mapped twice, different, or below fp32 where
    fp32 is promised; and what `open_checkpoint` raises.
    """
    checkpoint = open_checkpoint(path)
    config = read_config(checkpoint)
    depth = config.num_hidden_layers
    origin = model.checkpoint_origin
    chosen = range(depth)
    if origin is not None and origin.layers and model.config.num_hidden_layers != depth:
        chosen = origin.layers
    layers = {old: new for new, old in enumerate(chosen)}
    tensors = tensors_of(model)
    plan = plan_load(checkpoint, tensors, layers, depth, model.config.tie_word_embeddings)
    checkpoint.check_scales(fill.disk for fill in plan.fills)
    problems = [
        f"{fill.memory} differs from {fill.disk}"
        for fill in plan.fills
        if not _equal(checkpoint, fill, tensors[fill.memory])
    ]
    problems += [
        f"{name} is {tensor.dtype}, which is narrower than {wanted}"
        for name, tensor in tensors.items()
        if tensor.dtype.itemsize < (wanted := memory_dtype(name, tensor.dtype)).itemsize
    ]
    if plan.tied_head and not tied_head_equal(checkpoint, plan.tied_head, model):
        problems.append(f"{plan.tied_head} differs from the embeddings")
    problems += _compare_carried(checkpoint, plan, model.mtp or {})
    if problems:
        raise CheckpointError(f"the model is not the checkpoint in {checkpoint.path}", problems)
    return report(checkpoint, plan, tensors)


def _equal(checkpoint: Checkpoint, fill: Fill, tensor: Tensor) -> bool:
    held = tensor if fill.expert is None else tensor[fill.expert]
    narrow = checkpoint.narrow.weights.get(fill.disk)
    if narrow is not None and isinstance(held, NarrowWeight):
        return holds(held, checkpoint.stored, narrow)
    if narrow is not None:
        read = row_blocks(checkpoint.stored, narrow, held.dtype, held.device)
        return all(same_values(values, held[rows]) for rows, values in read)
    equal = _cast_equals(checkpoint.tensor(fill.disk), held)
    checkpoint.drop(fill.disk)
    return equal


def _cast_equals(stored: Tensor, held: Tensor) -> bool:
    same = same_bits if stored.dtype == held.dtype else same_values
    pairs = zip(blocks(stored), blocks(held), strict=True)
    return all(same(a.to(b.device).to(b.dtype), b) for a, b in pairs)


def tied_head_equal(checkpoint: Checkpoint, name: str, model: NemotronV3ForCausalLM) -> bool:
    """Whether the head on disk is the model's embedding matrix, which serves as its head."""
    equal = _cast_equals(checkpoint.tensor(name), model.model.embeddings.weight)
    checkpoint.drop(name)
    return equal


def _compare_carried(
    checkpoint: Checkpoint, plan: Plan, carried: Mapping[str, Tensor]
) -> list[str]:
    problems = [f"{name} is not in the file" for name in carried if name not in checkpoint]
    for name in plan.carried:
        stored = checkpoint.tensor(name)
        held = carried.get(name)
        if held is None:
            problems.append(f"{name} is not carried along")
        elif held.shape != stored.shape or not same_bits(held.cpu(), stored):
            problems.append(f"{name} differs")
        checkpoint.drop(name)
    return problems


def report(checkpoint: Checkpoint, plan: Plan, tensors: Mapping[str, Tensor]) -> LoadReport:
    """What a load by `plan` into `tensors` did."""
    casts = Counter(
        f"{(read := checkpoint.dtype_name(fill.disk))} -> {_held(tensors[fill.memory], read)}"
        for fill in plan.fills
    )
    return LoadReport(
        tensors=len(plan.fills),
        elements=sum(checkpoint.numel(fill.disk) for fill in plan.fills),
        casts=dict(casts),
        carried=tuple(plan.carried),
        left_out=len(plan.left_out),
        ignored=checkpoint.narrow.ignored,
        beside=checkpoint.stored.beside,
    )


def _held(tensor: Tensor, read: str) -> str:
    return read if isinstance(tensor, NarrowWeight) else _short(tensor.dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_config(checkpoint: Checkpoint) -> NemotronV3Config:
    """The typed config of an opened checkpoint; raises `CheckpointError`."""
    try:
        return NemotronV3Config.from_json(checkpoint.directory)
    except (ValueError, TypeError) as error:
        raise CheckpointError(str(error)) from error
