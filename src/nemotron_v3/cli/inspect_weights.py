"""What a checkpoint stores of each part of a model, and what its weights take in memory."""

import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron_v3.cli.terminal import new_table

if TYPE_CHECKING:
    import torch
    from rich.table import Table

    from nemotron_v3.checkpoint import Checkpoint

# The parts of a model by what stands in a weight's name, the first that does.
_PARTS = (
    ("mtp.", "multi-token prediction"),
    ("embedding", "embeddings"),
    ("lm_head", "head"),
    ("shared_experts", "shared experts"),
    (".experts.", "routed experts"),
    ("_latent_proj", "latent projections"),
    (".gate.", "routers"),
    ("in_proj", "mamba projections"),
    ("out_proj", "mamba projections"),
    ("q_proj", "attention"),
    ("k_proj", "attention"),
    ("v_proj", "attention"),
    ("o_proj", "attention"),
    ("up_proj", "MLPs"),
    ("down_proj", "MLPs"),
)
_REST = "norms, convolutions and the rest"


def has_weights(path: Path) -> bool:
    """Whether `path` is a directory with safetensors weights."""
    return path.is_dir() and any(path.glob("*.safetensors"))


def weight_tables(path: Path, dtype: "torch.dtype") -> "list[Table]":
    """What is stored of each part, and what it takes in memory, loaded in `dtype` or as it is.

    Raises `CheckpointError` for weights that cannot be read.
    """
    from nemotron_v3.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(path)
    return [_stored_table(checkpoint), _memory_table(checkpoint, dtype)]


def part_of(name: str) -> str:
    """The part of a model that the weight `name` belongs to."""
    return next((part for mark, part in _PARTS if mark in name), _REST)


def stored_bytes(checkpoint: "Checkpoint", name: str) -> int:
    """Bytes of the tensors in the files that a weight is made of."""
    narrow = checkpoint.narrow.weights.get(name)
    entries = map(checkpoint.stored.entry, (name,) if narrow is None else narrow.parts)
    return sum(entry.end - entry.begin for entry in entries)


def memory_bytes(checkpoint: "Checkpoint", dtype: "torch.dtype") -> tuple[int, int]:
    """Bytes of the model's weights loaded in `dtype`, and with narrow ones held as they are: these
    and, at a time, the largest layer's values."""
    from nemotron_v3.checkpoint.names import is_carried, to_memory
    from nemotron_v3.model.dtypes import memory_dtype

    wide, held, values = 0, 0, Counter[str]()
    for name in checkpoint:
        if is_carried(name):
            continue
        place = to_memory(name)
        memory = name if place is None else place.memory
        size = checkpoint.numel(name) * memory_dtype(memory, dtype).itemsize
        wide += size
        if name in checkpoint.narrow.weights:
            held += stored_bytes(checkpoint, name)
            values[memory.rpartition(".")[0]] += size  # both stacks of a layer's experts
        else:
            held += size
    return wide, held + max(values.values(), default=0)


def _stored_table(checkpoint: "Checkpoint") -> "Table":
    bytes_, weights, formats = (
        Counter[str](),
        Counter[str](),
        defaultdict[str, Counter[str]](Counter),
    )
    for name in checkpoint:
        part = part_of(name)
        narrow = checkpoint.narrow.weights.get(name)
        formats[part][checkpoint.dtype_name(name) if narrow is None else narrow.description] += 1
        bytes_[part] += stored_bytes(checkpoint, name)
        weights[part] += checkpoint.numel(name)
    table = new_table("part", "formats", title="stored")
    for heading in ("bits a\nweight", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = dict.fromkeys([*(part for _, part in _PARTS), _REST])
    for part in (part for part in order if part in weights):
        listed = ", ".join(
            f"{format_}: {count:,}" for format_, count in formats[part].most_common()
        )
        bits = 8 * bytes_[part] / max(1, weights[part])
        table.add_row(part, listed, f"{bits:.2f}", f"{bytes_[part]:,}")
    if ignored := checkpoint.narrow.ignored:
        table.add_row(
            "scales of activations and cache", f"without effect: {len(ignored):,}", "", ""
        )
    if beside := checkpoint.stored.beside:
        table.add_row("other modes than text", f"not read: {len(beside):,}", "", "")
    return table


def _memory_table(checkpoint: "Checkpoint", dtype: "torch.dtype") -> "Table":
    name = str(dtype).removeprefix("torch.")
    wide, held = memory_bytes(checkpoint, dtype)
    choices = [(f"loaded in {name}", wide)]
    if checkpoint.narrow.weights:
        choices.append(("held as stored (narrow=True), with a layer's values", held))
    devices = free_memory()
    table = new_table("weights in memory")
    table.add_column("bytes", justify="right", no_wrap=True)
    for device, free in devices.items():
        table.add_column(f"{device}, free\n{free / 2**30:,.1f} GiB", justify="right")
    for what, size in choices:
        fits = ("fits" if size <= free else "too large" for free in devices.values())
        table.add_row(what, f"{size:,}", *fits)
    return table


def free_memory() -> dict[str, int]:
    """Free bytes of the devices at hand."""
    import torch

    found = {}
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found["cpu"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.mem_get_info(index)[0]
    return found
