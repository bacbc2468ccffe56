"""A LoRA adapter of PEFT merged into a model in memory."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nemotron_v3.checkpoint.convert_adapter import Adapter, read_adapter
from nemotron_v3.checkpoint.convert_pieces import Part
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.plan import tensors_of
from nemotron_v3.checkpoint.side_files import templates_in, with_templates
from nemotron_v3.model.model import NemotronV3ForCausalLM


@torch.no_grad()
def merge_adapter(model: NemotronV3ForCausalLM, path: str | os.PathLike) -> Adapter:
    """Merge the LoRA adapter in the directory `path` into the model's weights, in place.

    The weights become those that `convert(adapter=path)` writes: `W + scale * B A`, computed in
    fp32 or wider and rounded once (arXiv 2106.09685; with magnitudes DoRA, arXiv 2402.09353). The
    chat template beside the adapter, if there is one, is saved with the model in place of its own.

    Args:
        model: a native model with all the layers that the adapter was trained on.
        path: a directory in PEFT's format: adapter_config.json and adapter_model.safetensors.

    Returns:
        What was merged.

    Raises:
        CheckpointError (a ValueError): no LoRA adapter that can be merged; tensors that the model
            does not have, or in another shape; a sum that is not finite in the weight's dtype. The
            model is as it was then.
    """
    weights = tensors_of(model)
    depth = model.config.num_hidden_layers
    adapter = read_adapter(path, weights, {i: i for i in range(depth)}, depth)
    # Computed twice, so that what is refused has changed nothing and no copy is held.
    for name in adapter.tensors:
        for target, source in _changes(adapter, weights, name):
            if not source.to(target.dtype).isfinite().all():
                raise CheckpointError(f"{name}: merged, it is not finite in {target.dtype}")
    for name in adapter.tensors:
        for target, source in _changes(adapter, weights, name):
            target.copy_(source)
    origin = model.checkpoint_origin
    if origin is not None:
        files = with_templates(origin.side_files, templates_in(adapter.path))
        model.checkpoint_origin = replace(origin, side_files=files)
    return adapter


def _changes(
    adapter: Adapter, weights: Mapping[str, Tensor], name: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat parts of the weight `name`, each with its merged values."""
    weight = weights[name]
    replaced: Part | None = adapter.replaced.get(name)
    whole = weight if replaced is None else replaced.source.tensor(replaced.name)
    experts = [e for n, e in adapter.updates if n == name] or [None]
    for expert in experts:
        target = weight if expert is None else weight[expert]
        base = whole if expert is None else whole[expert]
        update = adapter.updates.get((name, expert))
        part = Part(_Held(base.cpu()), name, update=update)
        place = target.view(-1)
        for block in part.blocks():
            yield place[: block.numel()], block.to(place.device)
            place = place[block.numel() :]


class _Held:
    """A tensor in memory as a source of parts."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor.dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensor

    def drop(self, name: str) -> None:
        """No-op: the tensor is in memory."""
