"""The names of tensors, in memory and on disk, as one table.

In memory a model has the names of transformers >= 5.23. On disk the released checkpoints say
`backbone.` where memory says `model.`, and keep one tensor for each expert where memory keeps one
stack. A checkpoint is written back in the spelling it was read with, which `CheckpointOrigin`
remembers.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nemotron_v3.checkpoint.narrow.layouts import Narrow

PREFIXES = ("backbone.", "model.")
EXPERTS = ("per_expert", "fused")
EMBEDDINGS = "model.embeddings.weight"
LM_HEAD = "lm_head.weight"

# `{prefix}` is one of PREFIXES, `{i}` a layer, `{e}` an expert, `{proj}` up_proj or down_proj and
# `{rest}` anything. The first row that fits a name decides.
_PARTS = {
    "{prefix}": r"(?P<prefix>backbone\.|model\.)",
    "{i}": r"(?P<i>0|[1-9]\d{0,8})",
    "{e}": r"(?P<e>0|[1-9]\d{0,8})",
    "{proj}": r"(?P<proj>up_proj|down_proj)",
    "{rest}": r"(?P<rest>.+)",
}


@dataclass(frozen=True)
class _Row:
    memory: str
    disk: str
    experts: str | None = None  # the spelling of experts (EXPERTS) that uses this row
    read_only: bool = False  # understood when read, never written


@cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w+\})", template)
    return re.compile("".join(_PARTS.get(piece, re.escape(piece)) for piece in pieces))


TABLE = (
    _Row("lm_head.weight", "lm_head.weight"),
    # Multi-token prediction: carried along and written back, spelling and all.
    _Row("mtp.{rest}", "mtp.{rest}"),
    _Row(
        "model.layers.{i}.mixer.experts.{proj}",
        "{prefix}layers.{i}.mixer.experts.{e}.{proj}.weight",
        experts="per_expert",
    ),
    _Row(
        "model.layers.{i}.mixer.experts.{proj}",
        "{prefix}layers.{i}.mixer.experts.{proj}",
        experts="fused",
    ),
    # Some transformers releases wrote this name, which nothing else reads.
    _Row("model.embeddings.weight", "{prefix}embedding.weight", read_only=True),
    _Row("model.layers.{i}.{rest}", "{prefix}layers.{i}.{rest}"),
    _Row("model.{rest}", "{prefix}{rest}"),
)


@dataclass(frozen=True)
class Place:
    """Where a tensor on disk belongs in memory.

    `memory` is the name there; `expert` the index into a stack of experts, `layer` the layer as the
    file counts them, `prefix` and `experts` the spelling, each None where the name has none.
    """

    memory: str
    layer: int | None = None
    expert: int | None = None
    prefix: str | None = None
    experts: str | None = None
    misspelt: bool = False

    @property
    def carried(self) -> bool:
        return is_carried(self.memory)


def is_carried(name: str) -> bool:
    """Whether a tensor is carried along untouched (multi-token prediction), not built in."""
    return name.startswith("mtp.")


def to_memory(disk: str, layers: Mapping[int, int] | None = None) -> Place | None:
    """The place of the tensor that a file calls `disk`; None when no row of the table fits.

    `layers` maps layers as the file counts them to layers as the model does; a layer outside it
    keeps its own number, and `Place.layer` tells the caller that it was left out.
    """
    for row in TABLE:
        if match := _pattern(row.disk).fullmatch(disk):
            break
    else:
        return None
    parts = match.groupdict()
    layer = int(parts["i"]) if parts.get("i") is not None else None
    if layer is not None and layers is not None and layer in layers:
        parts["i"] = str(layers[layer])
    return Place(
        memory=row.memory.format_map(parts),
        layer=layer,
        expert=int(parts["e"]) if parts.get("e") is not None else None,
        prefix=parts.get("prefix"),
        experts=row.experts,
        misspelt=row.read_only,
    )


def to_disk(memory: str, prefix: str, expert: int | None = None) -> str:
    """The name on disk of the tensor `memory`, or of one expert of the stack `memory`."""
    spelling = "fused" if expert is None else "per_expert"
    for row in TABLE:
        if row.read_only or row.experts not in (None, spelling):
            continue
        if match := _pattern(row.memory).fullmatch(memory):
            return row.disk.format_map(match.groupdict() | {"prefix": prefix, "e": expert})
    raise AssertionError(f"no row of the table fits {memory!r}")


def is_stack(memory: str) -> bool:
    """Whether the tensor `memory` is a stack of experts, which a file may hold one by one."""
    return any(row.experts and _pattern(row.memory).fullmatch(memory) for row in TABLE)


def majority_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """The dtype that most elements have, given dtypes and numbers of elements."""
    elements: Counter[torch.dtype] = Counter()
    for dtype, count in tensors:
        elements[dtype] += count
    return elements.most_common(1)[0][0]


@dataclass(frozen=True)
class LoadReport:
    """What a load, or an audit of one, proved.

    `tensors` on disk that fill the model, `elements` in them; `casts` counts tensors on disk by
    "dtype on disk -> dtype in memory", equal dtypes included ("nvfp4" and "fp8" name the layouts of
    weights of several tensors, each counted once); `carried` names the `mtp.*` tensors, `left_out`
    counts those of layers that were not asked for, `ignored` names scales of activations and of a
    cache in 8 bits, which change nothing here, `beside` the tensors of other modes than text.
    """

    tensors: int
    elements: int
    casts: Mapping[str, int]
    carried: tuple[str, ...] = ()
    left_out: int = 0
    ignored: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckpointOrigin:
    """How the checkpoint a model was loaded from spells things, so that a save spells them alike.

    `dtypes` gives the dtype of each tensor by its name on disk, `dtype` that of most elements;
    `shards` the names in each file, in the order of their bytes, and `metadata` the file's own
    notes; `index_metadata` is None for a checkpoint of one file. `tied_head` is whether a model
    whose head is its embedding matrix has both on disk. `layers` are the layers that were loaded,
    as the files count them, None for all; with some left out, names are those of the smaller model
    and `shards` is empty. `side_files` are the contents of the files that are saved with the model.
    Where weights stay in 8 or 4 bits, `narrow` says which tensors each is made of, the names are
    those of the stored tensors, and `companions` has those that no tensor of the model holds, or
    holds in another shape, backed by the file.
    """

    path: Path
    prefix: str
    experts: str | None
    dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]
    shards: Mapping[str, tuple[str, ...]]
    metadata: Mapping[str, Mapping[str, str]]
    index_metadata: Mapping[str, object] | None
    tied_head: bool
    layers: tuple[int, ...] | None
    report: LoadReport
    side_files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    narrow: Narrow | None = field(default=None, repr=False)
    companions: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
