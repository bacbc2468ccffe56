"""Convert a checkpoint on disk to another spelling, without a model in memory.

A conversion is planned from headers alone: names and shapes are proven one to one against the
config, options are checked, and every tensor to write knows which bytes of the source it is made
of. Then the tensors are streamed, and what was written is read again and compared with the source
before it takes the place of what was there.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nemotron_v3.checkpoint.audit import read_config
from nemotron_v3.checkpoint.convert_adapter import Adapter, read_adapter
from nemotron_v3.checkpoint.convert_kept import as_stored, check_kept, stored_pieces
from nemotron_v3.checkpoint.convert_pieces import (
    LowRank,
    NarrowPart,
    Part,
    StoredPiece,
    equal_values,
)
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import weight_dtype
from nemotron_v3.checkpoint.load import check_depth, choose_layers, origin_of, skeleton
from nemotron_v3.checkpoint.names import EMBEDDINGS, LM_HEAD, CheckpointOrigin, is_stack
from nemotron_v3.checkpoint.narrow.declared import HF_QUANT_CONFIG
from nemotron_v3.checkpoint.plan import Plan, plan_load, tensors_of
from nemotron_v3.checkpoint.prove_merge import MergedTensor, merged_tensors
from nemotron_v3.checkpoint.reader import Checkpoint, open_checkpoint
from nemotron_v3.checkpoint.replace import CONFIG, INDEX, SINGLE, replacing
from nemotron_v3.checkpoint.side_files import (
    MORE_TEMPLATES,
    is_template,
    names_in,
    read_side_files,
    templates_in,
    with_templates,
    write_side_files,
)
from nemotron_v3.checkpoint.spelling import (
    Files,
    Spelling,
    config_to_write,
    index_text,
)
from nemotron_v3.checkpoint.writer import nbytes, numel, write_safetensors
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.model.dtypes import memory_dtype

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the bytes done and the bytes to do."""


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    experts: str | None = None,
    prefix: str | None = None,
    layers: int | Sequence[int] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    dequantise: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> "Conversion":
    """Write the checkpoint in the directory `source` to `target` in another spelling.

    What is written is what `save_pretrained(from_pretrained(source), target)` writes with the same
    options, but only a block of a million elements of it is in memory at a time. It is read again
    and compared bit for bit before it takes its place; a conversion that is killed or fails leaves
    what was in `target`, and nothing that loads where there was nothing. Tokenizer, chat template
    and generation_config.json are copied along; a chat template beside the adapter takes the place
    of the source's.

    Args:
        source: as for `from_pretrained`.
        target: made if it does not exist; may be `source`.
        dtype, max_shard_size, experts, prefix: as for `save_pretrained`; None is as read.
        layers: the first so many layers, or the indices of some in rising order, None for all.
        adapter: the directory of a LoRA adapter in PEFT's format, which is merged: computed in fp32
            or wider, rounded once.
        dequantise: whether weights in 8 or 4 bits are written with their values, each rounded once
            to `dtype` (None: the config's); without it they stay as they are, byte for byte, and
            only `max_shard_size` may be asked for.
        overwrite: whether files in `target` may be replaced.
        progress: called while tensors are read and written.

    Returns:
        The conversion, which says what was done.

    Raises:
        CheckpointError (a ValueError): a source, an adapter or an option that cannot be; files in
            `target` without `overwrite`; too little room on the disk. Nothing is written then.
        OSError: the disk refuses; what was in `target` stays.
    """
    plan = plan_conversion(
        source,
        target,
        dtype=dtype,
        max_shard_size=max_shard_size,
        experts=experts,
        prefix=prefix,
        layers=layers,
        adapter=adapter,
        dequantise=dequantise,
        overwrite=overwrite,
    )
    plan.run(progress)
    return plan


@dataclass(frozen=True)
class Conversion:
    """A conversion that was planned, and checked as far as headers tell.

    `checkpoint` is read by `plan`, `files` are written with `config`; `prefix` and `experts` are
    how they are spelled; `copied` names side files, `left_behind` files that are not carried along,
    `templates` are the adapter's chat templates;
    `layers` are those converted, None for all.
    """

    checkpoint: Checkpoint
    target: Path
    plan: Plan
    origin: CheckpointOrigin
    config: NemotronV3Config
    files: Files[StoredPiece]
    prefix: str
    experts: str | None
    layers: tuple[int, ...] | None
    adapter: Adapter | None
    overwrite: bool
    copied: tuple[str, ...]
    left_behind: tuple[str, ...]
    templates: Mapping[str, bytes]

    @property
    def pieces(self) -> list[StoredPiece]:
        return [piece for shard in self.files.shards.values() for piece in shard]

    @property
    def bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(map(nbytes, self.pieces))

    @property
    def elements(self) -> int:
        return sum(map(numel, self.pieces))

    @property
    def casts(self) -> dict[str, int]:
        """Numbers of written tensors by "dtype read -> dtype written", equal dtypes included."""
        return dict(Counter(f"{_dtypes_read(p)} -> {_short(p.dtype)}" for p in self.pieces))

    @property
    def merged(self) -> int:
        """Number of written tensors that the adapter changes or replaces."""
        return sum(piece.merged for piece in self.pieces)

    def run(self, progress: Progress | None = None) -> list[MergedTensor]:
        """Write, prove, and put in place; raises what `convert` raises.

        Returns:
            The tensors that the adapter changed, each with the size of its change and the error of
            the sum as it was measured; empty without an adapter.
        """
        progress = progress or (lambda doing, done, total: None)
        _check_target(self.target, self.copied, self.overwrite)
        _check_room(self.target, self.bytes)
        self._check_range(progress)
        with replacing(self.target) as directory:
            done, total = 0, self.bytes
            for file, shard in self.files.shards.items():
                pieces = [_WithProgress(piece, progress, total) for piece in shard]
                for piece in pieces:
                    piece.done = done
                    done += nbytes(piece)
                write_safetensors(directory / file, pieces, self.files.metadata[file])
            if self.files.index_metadata is not None:
                (directory / INDEX).write_text(index_text(self.files))
            source = self.checkpoint
            held = read_side_files(source.path, source.directory, HF_QUANT_CONFIG in self.copied)
            files = {name: held[name] for name in self.copied if name not in self.templates}
            write_side_files(directory, with_templates(files, self.templates))
            self.config.to_json(directory / CONFIG)
            return self._prove(directory, progress)

    def _check_range(self, progress: Progress) -> None:
        """Read what is to become fp16, or fp32 from fp64, before anything is written: its values
        may be out of range. (bf16 has the range of fp32 but for its last 0.4 %.)"""
        narrow = [piece for piece in self.pieces if _may_overflow(piece)]
        done, total = 0, sum(map(nbytes, narrow))
        for piece in narrow:
            for _ in piece.blocks():
                pass
            done += nbytes(piece)
            progress("checking", done, total)

    def _prove(self, directory: Path, progress: Progress) -> list[MergedTensor]:
        """Raise `CheckpointError` unless the checkpoint in `directory` opens, is the config's,
        holds every tensor to the bit, and merged ones are the sum of base and adapter."""
        written = open_checkpoint(directory)
        config = read_config(written)
        if config != self.config:
            raise CheckpointError(f"{directory / CONFIG} does not read back as it was written")
        model = skeleton(written, config, BackendConfig())
        depth = config.num_hidden_layers
        identity = {i: i for i in range(depth)}
        plan_load(written, tensors_of(model), identity, depth, config.tie_word_embeddings)
        done, total, problems = 0, self.bytes, []
        for piece in self.pieces:
            if not piece.is_written_in(written.stored):
                problems.append(f"{piece.name} is not on the disk as it was written")
            done += nbytes(piece)
            progress("proving", done, total)
        if problems:
            raise CheckpointError(f"the conversion to {self.target} cannot be proven", problems)
        return merged_tensors(self.pieces, written)


class _WithProgress:
    """A piece that reports progress.

    Attributes:
        done: bytes written before it.
    """

    def __init__(self, piece: StoredPiece, progress: Progress, total: int):
        self.name, self.shape, self.dtype = piece.name, piece.shape, piece.dtype
        self.done = 0
        self._piece, self._progress, self._total = piece, progress, total

    def blocks(self) -> Iterator[Tensor]:
        done = self.done
        for block in self._piece.blocks():
            yield block
            done += block.numel() * self.dtype.itemsize
            self._progress("writing", done, self._total)


def plan_conversion(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    max_shard_size: int | str | None = None,
    experts: str | None = None,
    prefix: str | None = None,
    layers: int | Sequence[int] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    dequantise: bool = False,
    overwrite: bool = False,
) -> Conversion:
    """What `convert` would do; nothing is written. Raises `CheckpointError` as it does."""
    dtype = weight_dtype(dtype, "saved")
    checkpoint = open_checkpoint(source)
    config = read_config(checkpoint)
    kept = bool(checkpoint.narrow) and not dequantise
    if kept:
        asked = {"dtype": dtype, "experts": experts, "prefix": prefix, "layers": layers}
        check_kept(checkpoint, asked | {"adapter": adapter})
    else:
        config = config.of_wide_weights()
    depth, tied = config.num_hidden_layers, config.tie_word_embeddings
    check_depth(checkpoint, depth)
    chosen = choose_layers(layers, depth)
    if chosen is not None:
        config = config.of_layers(chosen)
    model = skeleton(checkpoint, config, BackendConfig())
    layer_map = {old: new for new, old in enumerate(chosen if chosen is not None else range(depth))}
    tensors = tensors_of(model)
    plan = plan_load(checkpoint, tensors, layer_map, depth, tied)
    _check_tied_head(checkpoint, plan)
    if checkpoint.narrow:
        checkpoint.check_scales(checkpoint)
    change = read_adapter(adapter, tensors, layer_map, depth) if adapter is not None else None
    origin = origin_of(checkpoint, plan, model, chosen)
    if kept:
        origin = as_stored(checkpoint, origin)
    spelling = Spelling.choose(origin, experts, prefix)
    if kept:
        pieces = stored_pieces(checkpoint)
    else:
        pieces = _Pieces(checkpoint, plan, spelling, change, dtype).all(tensors)
    files = spelling.files(pieces, max_shard_size)
    copied, left_behind = _side_files(checkpoint.path, Path(target), kept)
    templates = {} if adapter is None else templates_in(Path(adapter))
    if templates:
        copied = (*(name for name in copied if not is_template(name)), *templates)
    _check_target(Path(target), copied, overwrite)
    _check_room(Path(target), sum(map(nbytes, pieces)))
    return Conversion(
        checkpoint=checkpoint,
        target=Path(target),
        plan=plan,
        origin=origin,
        config=config_to_write(config, pieces, origin),
        files=files,
        prefix=spelling.prefix,
        experts=spelling.experts if any(map(is_stack, tensors)) else None,
        layers=chosen,
        adapter=change,
        overwrite=overwrite,
        copied=copied,
        left_behind=left_behind,
        templates=templates,
    )


@dataclass(frozen=True)
class _Pieces:
    """Makes the tensors to write from those that the plan found."""

    checkpoint: Checkpoint
    plan: Plan
    spelling: Spelling
    adapter: Adapter | None
    dtype: torch.dtype | None

    def all(self, tensors: Mapping[str, Tensor]) -> list[StoredPiece]:
        """All pieces: the model's tensors in order, a tied head, then carried tensors."""
        pieces = [
            self._piece(disk, name, tensor.shape, expert)
            for name, tensor in tensors.items()
            for disk, expert in self.spelling.names(name, tensor.shape)
        ]
        if self.plan.tied_head:
            shape = tensors[EMBEDDINGS].shape
            dtype = self._dtype(LM_HEAD, shape, None)
            pieces.append(StoredPiece(LM_HEAD, shape, dtype, self._parts(EMBEDDINGS, shape, None)))
        for name in self.plan.carried:
            shape, dtype = self.checkpoint.shape(name), self.checkpoint.dtype(name)
            pieces.append(StoredPiece(name, shape, dtype, [self._read(name)]))
        return pieces

    def _piece(self, disk: str, name: str, shape: Sequence[int], expert: int | None) -> StoredPiece:
        parts = self._parts(name, shape, expert)
        dtype = self._dtype(name, shape, expert)
        return StoredPiece(disk, shape if expert is None else shape[1:], dtype, parts)

    def _dtype(self, name: str, shape: Sequence[int], expert: int | None) -> torch.dtype:
        if self.dtype is not None:
            return memory_dtype(name, self.dtype)
        read = self.spelling.read_dtype(name, expert, shape)
        assert read is not None, f"{name} is of the plan, and was not read"
        return read

    def _parts(self, name: str, shape: Sequence[int], expert: int | None) -> list[Part]:
        if self.adapter is not None and (part := self.adapter.replaced.get(name)):
            # PEFT saves the whole head or embedding matrix beside an adapter of it.
            return [replace(part, update=self.adapter.updates.get((name, None)))]
        if not is_stack(name) or expert is not None:
            return [self._part(name, expert)]
        if (name, None) in self._stored and name not in self._changed:
            return [self._read(self._stored[name, None])]
        return [self._part(name, e) for e in range(shape[0])]

    def _part(self, name: str, expert: int | None) -> Part:
        update = self.adapter.updates.get((name, expert)) if self.adapter else None
        if (name, expert) in self._stored:
            return self._read(self._stored[name, expert], update=update)
        return self._read(self._stored[name, None], expert, update)

    def _read(self, disk: str, expert: int | None = None, update: LowRank | None = None) -> Part:
        """The part to read for the weight that the checkpoint calls `disk`."""
        stored, narrow = self.checkpoint.stored, self.checkpoint.narrow.weights.get(disk)
        if narrow is None:
            return Part(stored, disk, expert, update)
        return NarrowPart(stored, disk, update=update, weight=narrow)

    @cached_property
    def _changed(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.adapter.updates) if self.adapter else frozenset()

    @cached_property
    def _stored(self) -> Mapping[tuple[str, int | None], str]:
        return {(fill.memory, fill.expert): fill.disk for fill in self.plan.fills}


def _check_tied_head(checkpoint: Checkpoint, plan: Plan) -> None:
    if plan.tied_head is None:
        return
    embeddings = next(fill.disk for fill in plan.fills if fill.memory == EMBEDDINGS)
    if not equal_values(checkpoint, plan.tied_head, checkpoint, embeddings):
        raise CheckpointError(
            f"{checkpoint.path}: config.json says tie_word_embeddings, but {plan.tied_head} is not "
            "equal to the embeddings: set tie_word_embeddings to false to keep it"
        )


def _side_files(
    source: Path, target: Path, narrow: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of what lies beside the weights of `source`: files that are copied, and what is not.

    Directories end in a slash.
    """
    if target.exists() and source.samefile(target):
        stays = narrow and (source / HF_QUANT_CONFIG).exists()
        return (HF_QUANT_CONFIG,) if stays else (), ()
    held = {path.name for path in source.iterdir() if path.is_file()}
    own = {name for name in held if name in (CONFIG, INDEX) or name.endswith(".safetensors")}
    copied = names_in(source, narrow)
    hidden = {name for name in held if name.startswith(".")}
    folders = {f"{path.name}/" for path in source.iterdir() if path.is_dir()}
    folders = {n for n in folders if not n.startswith(".") and n != f"{MORE_TEMPLATES}/"}
    return copied, tuple(sorted((held - own - hidden - set(copied)) | folders))


def _check_target(target: Path, copied: Sequence[str], overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file: give a directory to write to")
    if overwrite or not target.exists():
        return
    standing = [name for name in (CONFIG, SINGLE, INDEX, *copied) if (target / name).exists()]
    standing += sorted(p.name for p in target.glob("model-*-of-*.safetensors"))
    standing += sorted(p.name for p in target.glob(".whole-*"))
    if standing:
        raise CheckpointError(
            f"{target} holds {', '.join(standing[:3])}{' ...' if standing[3:] else ''}: give "
            "another directory, or overwrite (--overwrite) to replace what is there"
        )


def _check_room(target: Path, needed: int) -> None:
    standing = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(standing).free
    if free < needed:
        raise CheckpointError(
            f"{target}: {needed:,} bytes are to be written and {free:,} are free there: make room, "
            "or give a directory on another disk"
        )


def _may_overflow(piece: StoredPiece) -> bool:
    if piece.dtype not in (torch.float16, torch.float32):
        return False
    if piece.merged and piece.dtype == torch.float16:
        return True
    held = {part.dtype for part in piece.parts}
    return any(torch.finfo(dtype).max > torch.finfo(piece.dtype).max for dtype in held)


def _dtypes_read(piece: StoredPiece) -> str:
    return ", ".join(sorted({part.dtype_name for part in piece.parts}))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
