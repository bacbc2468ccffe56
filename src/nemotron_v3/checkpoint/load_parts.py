"""From a checkpoint on disk to a model that several processes hold: each reads its own parts."""

import os
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nemotron_v3.checkpoint.audit import read_config
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.load import check_depth, origin_of
from nemotron_v3.checkpoint.plan import Fill, plan_load, tensors_of
from nemotron_v3.checkpoint.reader import Checkpoint, open_with_side_files
from nemotron_v3.checkpoint.side_files import read_generation_config
from nemotron_v3.model.model import NemotronV3ForCausalLM


@torch.no_grad()
def load_parts(model: NemotronV3ForCausalLM, path: str | os.PathLike[str]) -> None:
    """Fill a model from the checkpoint directory `path`, in place, in the dtypes that it has.

    Of each tensor this process reads what it holds of it: of a stack of experts the files' tensors
    of its own experts alone. Nothing is sent; every process of the model calls it.

        with torch.device("meta"):
            model = NemotronV3ForCausalLM(config)
        parallelize(model, Plan(ep=8))
        model.to_empty(device="cuda")
        load_parts(model, path)

    Args:
        model: with storage, spread over processes or not.
        path: as `from_pretrained` takes it.

    Raises:
        CheckpointError (a ValueError): see `from_pretrained`; tensors of the model that the
            checkpoint does not fill.
        ValueError: a model on the meta device.
    """
    checkpoint, side_files = open_with_side_files(path)
    config = read_config(checkpoint).of_wide_weights()
    depth = config.num_hidden_layers
    check_depth(checkpoint, depth)
    destinations = tensors_of(model)
    if bare := [name for name, tensor in destinations.items() if tensor.is_meta]:
        raise ValueError(f"{bare[0]} has no storage: call model.to_empty(device=...) before")
    tied = model.config.tie_word_embeddings
    plan = plan_load(checkpoint, destinations, {i: i for i in range(depth)}, depth, tied)
    if left := dict(model.named_buffers()).keys() - destinations.keys():
        raise CheckpointError(
            f"{path}: a checkpoint does not hold {sorted(left)[0]}, which would be what was in "
            "memory: leave force_e_score_correction_bias True"
        )
    checkpoint.check_scales(checkpoint)
    for fill in plan.fills:
        _fill(destinations[fill.memory], fill, checkpoint)
        checkpoint.drop(fill.disk)
    model.mtp = {name: checkpoint.tensor(name) for name in plan.carried} or None
    origin = origin_of(checkpoint, plan, model, None)
    model.checkpoint_origin = replace(origin, side_files=side_files)
    model.generation_config = read_generation_config(side_files, checkpoint.path)


def _fill(tensor: Tensor, fill: Fill, checkpoint: Checkpoint) -> None:
    """Bring what this process holds of a tensor, or of one expert of it, to its place."""
    target, shape, offset = _held(tensor)
    if fill.expert is not None:
        row = fill.expert - offset[0]
        if not 0 <= row < shape[0]:
            return
        target, shape, offset = target[row], shape[1:], offset[1:]
    if not target.numel():
        return
    if tuple(shape) == checkpoint.shape(fill.disk):
        checkpoint.copy_to(fill.disk, target)
        return
    part = tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))
    target.copy_(checkpoint.tensor(fill.disk)[part])


def _held(tensor: Tensor) -> tuple[Tensor, Sequence[int], Sequence[int]]:
    """What this process holds of a tensor, the shape of it, and where it begins."""
    if not hasattr(tensor, "device_mesh"):
        return tensor, tensor.shape, (0,) * tensor.dim()
    # Only here: a process of its own need not wait for what several need.
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    assert isinstance(tensor, DTensor)
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return tensor.to_local(), shape, offset
