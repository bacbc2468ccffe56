"""Load a checkpoint on disk into a model in memory, tensor by tensor."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch

from nemotron_v3.checkpoint.audit import Ledger, read_config, report, tied_head_equal
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import weight_dtype
from nemotron_v3.checkpoint.names import CheckpointOrigin, majority_dtype, to_disk, to_memory
from nemotron_v3.checkpoint.narrow.hold import held_narrow
from nemotron_v3.checkpoint.plan import Plan, plan_load, tensors_of
from nemotron_v3.checkpoint.reader import Checkpoint, open_with_side_files
from nemotron_v3.checkpoint.save_kept import as_held
from nemotron_v3.checkpoint.side_files import read_generation_config
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.model.model import NemotronV3ForCausalLM


@torch.inference_mode(False)
@torch.no_grad()
def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    backend: BackendConfig | None = None,
    layers: int | Sequence[int] | None = None,
    narrow: bool = False,
) -> NemotronV3ForCausalLM:
    """The model in the checkpoint directory `path`, in eval mode.

    The model is built without storage; then each tensor is read from the memory-mapped file
    straight into its place on `device`, cast once. Quantised weights are copied as codes and
    dequantised on the device. Host memory beyond the model itself stays below its largest tensor
    on disk. Every parameter and buffer is proven to come from the file: what was proven is in
    `model.checkpoint_origin.report`. `mtp.*` tensors are not built in: `model.mtp` holds them, on
    the CPU, backed by the file. `model.generation_config` is what generation_config.json says, and
    tokenizer, chat template and generation config stay with the model for the next save.

    Args:
        path: a directory with config.json and model.safetensors, or an index and its shards.
        dtype: bfloat16, float16, float32 or float64, as torch's dtype or by name; None or "auto" is
            the config's, else that of most of the file's elements. `A_log`, `D`, `dt_bias` and
            `e_score_correction_bias` are fp32 or wider all the same.
        device: None is torch's default device.
        backend: a `BackendConfig`, a foreign one, or None for the default.
        layers: the first so many layers, or the indices of some in rising order, None for all; the
            model and its config then are those of the smaller model.
        narrow: whether weights that the file holds in 8 or 4 bits stay so in memory: frozen
            `nemotron_v3.layers.narrow.NarrowWeight`s, which have their values, in `dtype`, one
            layer at a time as they are used. A stack whose experts have several layouts is given
            its values at once all the same, and `checkpoint_origin.report.casts` lists it.

    Raises:
        CheckpointError (a ValueError): nothing there, or a truncated, foreign or pickled file;
            weights in 8 or 4 bits of an unknown layout, or with scales that cannot be; names,
            shapes or dtypes that are not those of the config, all listed.
        ValueError: a dtype or layers that cannot be.
    """
    dtype = weight_dtype(dtype, "loaded")
    checkpoint, side_files = open_with_side_files(path, narrow)
    generation_config = read_generation_config(side_files, checkpoint.path)
    config = read_config(checkpoint)
    config = config if narrow else config.of_wide_weights()
    depth = config.num_hidden_layers
    check_depth(checkpoint, depth)
    chosen = choose_layers(layers, depth)
    dtype = _choose_dtype(dtype, config, checkpoint)
    device = torch.device(device) if device is not None else torch.get_default_device()
    if chosen is not None:
        config = config.of_layers(chosen)
    model = skeleton(checkpoint, config, BackendConfig.from_any(backend))
    layer_map = {old: new for new, old in enumerate(chosen if chosen is not None else range(depth))}
    destinations = tensors_of(model)
    plan = plan_load(checkpoint, destinations, layer_map, depth, config.tie_word_embeddings)
    checkpoint.check_scales(checkpoint)
    if config.num_nextn_predict_layers and not plan.carried:
        warnings.warn(
            f"{path}: config.json promises multi-token prediction, and no tensor is called mtp.*: "
            "the model is loaded without it",
            stacklevel=2,
        )
    stay = {}
    if narrow:
        shapes = {name: tensor.shape for name, tensor in destinations.items()}
        stay = held_narrow(plan.fills, checkpoint.narrow.weights, shapes)
    ledger = Ledger(destinations, dtype, device, stay)
    for fill in plan.fills:
        ledger.write(fill, checkpoint)
        checkpoint.drop(fill.disk)
    ledger.install(model)
    ledger.prove(model)
    if plan.tied_head and not tied_head_equal(checkpoint, plan.tied_head, model):
        raise CheckpointError(
            f"{path}: config.json says tie_word_embeddings, but {plan.tied_head} is not equal to "
            "the embeddings: set tie_word_embeddings to false to keep it"
        )
    model.mtp = {name: checkpoint.tensor(name) for name in plan.carried} or None
    origin = origin_of(checkpoint, plan, model, chosen)
    if stay:
        origin = as_held(checkpoint, origin)
    model.checkpoint_origin = replace(origin, side_files=side_files)
    model.generation_config = generation_config
    return model.eval()


def choose_layers(layers: int | Sequence[int] | None, depth: int) -> tuple[int, ...] | None:
    """The layers asked for, of `depth`, as indices; None for all. Raises `ValueError`."""
    if layers is None:
        return None
    if isinstance(layers, int):
        if isinstance(layers, bool) or not 1 <= layers <= depth:
            raise ValueError(
                f"layers={layers}: the checkpoint has {depth} layers, give 1 to {depth}"
            )
        return tuple(range(layers))
    chosen = tuple(layers)
    if not all(type(i) is int and 0 <= i < depth for i in chosen) or not chosen:
        raise ValueError(f"layers={chosen}: give layers between 0 and {depth - 1}")
    if list(chosen) != sorted(set(chosen)):
        raise ValueError(f"layers={chosen}: give each layer once, in rising order")
    return chosen


def _choose_dtype(
    dtype: torch.dtype | None, config: NemotronV3Config, checkpoint: Checkpoint
) -> torch.dtype:
    if dtype is None:
        stored = ((checkpoint.dtype(name), checkpoint.numel(name)) for name in checkpoint)
        dtype = weight_dtype(config.dtype or majority_dtype(stored), "loaded")
    return dtype


def check_depth(checkpoint: Checkpoint, depth: int) -> None:
    """Raise `CheckpointError` where the tensors are not those of `depth` layers; asked before such
    a model is built, which costs time for each layer."""
    places = (to_memory(name) for name in checkpoint)
    held = {place.layer for place in places if place is not None and place.layer is not None}
    if not held or held != set(range(depth)):
        found = f"{len(held)} layers, the last of them {max(held)}" if held else "none"
        raise CheckpointError(
            f"{checkpoint.path}: config.json describes layers 0 to {depth - 1}, the tensors "
            f"{found}: the config or the weights belong to another model"
        )


def skeleton(
    checkpoint: Checkpoint, config: NemotronV3Config, backend: BackendConfig
) -> NemotronV3ForCausalLM:
    """The model of `config` without storage; raises `CheckpointError`."""
    try:
        with torch.device("meta"):
            return NemotronV3ForCausalLM(config, backend)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.directory}: no model can be built from config.json: {error}"
        ) from error


def origin_of(
    checkpoint: Checkpoint,
    plan: Plan,
    model: NemotronV3ForCausalLM,
    chosen: tuple[int, ...] | None,
) -> CheckpointOrigin:
    """How `checkpoint` spells what `plan` loads from it into `model`."""
    # The names that a save writes: as read, apart from misspelt and renumbered ones.
    written = {f.disk: to_disk(f.memory, plan.prefix, f.expert) for f in plan.fills}
    written |= {name: name for name in plan.carried}
    if plan.tied_head:
        written[plan.tied_head] = plan.tied_head
    # What is loaded from several tensors is saved as one.
    as_read = chosen is None and not checkpoint.narrow.weights and not checkpoint.stored.outer
    shards = checkpoint.shards if as_read else {}
    return CheckpointOrigin(
        path=checkpoint.path,
        prefix=plan.prefix,
        experts=plan.experts,
        dtype=majority_dtype((checkpoint.dtype(n), checkpoint.numel(n)) for n in written),
        dtypes={new: checkpoint.dtype(name) for name, new in written.items()},
        shards={file: tuple(written[n] for n in shard.entries) for file, shard in shards.items()},
        metadata={file: dict(shard.metadata) for file, shard in shards.items()},
        index_metadata=checkpoint.index_metadata if chosen is None else None,
        tied_head=plan.tied_head is not None,
        layers=chosen,
        report=report(checkpoint, plan, tensors_of(model)),
    )
