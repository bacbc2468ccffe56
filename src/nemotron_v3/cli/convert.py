"""`nemotron-v3 convert`: a checkpoint in another spelling, or with an adapter merged into it."""

import contextlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from nemotron_v3.cli.dtypes import DTYPES, dtype_name
from nemotron_v3.cli.options import Choices
from nemotron_v3.cli.terminal import console_for, harmless, new_console, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from nemotron_v3.checkpoint import Conversion
    from nemotron_v3.checkpoint.prove_merge import MergedTensor


@dataclass(frozen=True)
class Convert:
    """Write a checkpoint in another spelling, streamed and proven, or merge a LoRA adapter.

    What is not asked for stays as it is.
    """

    source: tyro.conf.Positional[Path]
    """folder with config.json and safetensors weights"""
    target: tyro.conf.Positional[Path]
    """folder to write to"""
    dtype: Annotated[str | None, Choices(tuple(DTYPES))] = None
    """of the weights: bfloat16, float16, float32 or float64 (bf16, fp16, ...). A_log, D, dt_bias
    and the router's bias stay fp32 or wider"""
    max_shard_size: str | None = None
    """such as 5GB or 500MB"""
    experts: Literal["per_expert", "fused"] | None = None
    """one tensor for each expert, or one stack"""
    prefix: Literal["backbone", "model"] | None = None
    """what names begin with"""
    layers: str | None = None
    """only these, such as 0-3,7; they are renumbered from 0"""
    adapter: Path | None = None
    """folder of a LoRA adapter in PEFT's format, to merge"""
    dequantise: bool = False
    """write weights in 8 or 4 bits with their values; without it they stay as they are, and only
    max_shard_size may be asked for"""
    dry_run: bool = False
    """show what would be done, and write nothing"""
    overwrite: bool = False
    """replace what is in the target"""
    json: bool = False
    """print one JSON object that says what was done"""

    def run(self) -> None:
        plan = self.plan()
        merged = None
        if not self.json:
            table = plan_table(plan)
            console_for(table, narrowest=60).print(table)
        if not self.dry_run:
            with _progress() as progress:
                merged = plan.run(progress)
        if self.json:
            print(json.dumps(summary(plan, merged), indent=2))
        elif merged is None:
            print("dry run: nothing was written")
        else:
            _tell(plan, merged)

    def plan(self) -> "Conversion":
        """What is to be done; raises `ValueError`."""
        import torch

        from nemotron_v3.checkpoint import plan_conversion

        return plan_conversion(
            self.source,
            self.target,
            dtype=getattr(torch, dtype_name(self.dtype)) if self.dtype is not None else None,
            max_shard_size=self.max_shard_size,
            experts=self.experts,
            prefix=f"{self.prefix}." if self.prefix else None,
            layers=None if self.layers is None else parse_layers(self.layers),
            adapter=self.adapter,
            dequantise=self.dequantise,
            overwrite=self.overwrite,
        )


def parse_layers(text: str) -> tuple[int, ...]:
    """`0-3,7` as (0, 1, 2, 3, 7); raises `ValueError`."""
    chosen: list[int] = []
    for piece in text.split(","):
        first, dash, last = piece.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(piece) > 12:
            raise ValueError(f"layers is {text!r}: give numbers and ranges, such as 0-3,7")
        chosen += range(int(first), min(int(last or first), 100_000) + 1)
    return tuple(chosen)


def summary(plan: "Conversion", merged: "Sequence[MergedTensor] | None") -> dict[str, Any]:
    """What is read and written, as JSON has it; `merged` is None for a dry run."""
    checkpoint, adapter = plan.checkpoint, plan.adapter
    described = None
    if adapter is not None:
        described = {
            "path": str(adapter.path),
            "ranks": list(adapter.ranks),
            "tensors": {m.name: {"change": m.change, "error": m.error} for m in merged or ()},
        }
    return {
        "source": str(checkpoint.path),
        "target": str(plan.target),
        "written": merged is not None,
        "tensors": {"read": len(checkpoint), "written": len(plan.pieces)},
        "bytes": {"read": _read_bytes(plan), "written": plan.bytes},
        "files": {"read": list(checkpoint.shards), "written": list(plan.files.shards)},
        "prefix": {"read": plan.origin.prefix, "written": plan.prefix},
        "experts": {"read": plan.origin.experts, "written": plan.experts},
        "layers": _layer_numbers(plan),
        "pattern": plan.config.hybrid_override_pattern,
        "casts": plan.casts,
        "merged_tensors": plan.merged,
        "adapter": described,
        "carried_along": list(plan.plan.carried),
        "left_out": list(plan.plan.left_out),
        "copied": list(plan.copied),
        "left_behind": list(plan.left_behind),
    }


def plan_table(plan: "Conversion") -> "Table":
    """What is read beside what is written."""
    from rich.markup import escape

    from nemotron_v3.checkpoint.names import majority_dtype
    from nemotron_v3.checkpoint.writer import numel

    checkpoint, origin = plan.checkpoint, plan.origin
    depth = plan.config.num_hidden_layers
    written = majority_dtype((p.dtype, numel(p)) for p in plan.pieces)
    rows = [
        ("folder", str(checkpoint.path), str(plan.target)),
        ("tensors", f"{len(checkpoint.stored):,}", f"{len(plan.pieces):,}"),
        ("bytes", f"{_read_bytes(plan):,}", f"{plan.bytes:,}"),
        ("files", f"{len(checkpoint.shards):,}", f"{len(plan.files.shards):,}"),
        ("prefix", origin.prefix, plan.prefix),
        ("experts", str(origin.experts), str(plan.experts)),
        ("most weights", _short(origin.dtype), _short(written)),
        ("layers", _layers_read(plan), f"{depth:,}: {plan.config.hybrid_override_pattern}"),
    ]
    for cast, count in sorted(plan.casts.items()):
        read, _, new = cast.partition(" -> ")
        rows.append(("unchanged" if read == new else "cast", read, f"{new}: {count:,} tensors"))
    if plan.adapter is not None:
        ranks = ", ".join(map(str, plan.adapter.ranks)) or "none"
        rows.append(("merged", f"{plan.adapter.path} (rank {ranks})", f"{plan.merged:,} tensors"))
    if plan.plan.carried:
        rows.append(("carried along", "mtp.*", f"{len(plan.plan.carried):,} tensors"))
    if plan.plan.left_out:
        rows.append(("left out", f"{len(plan.plan.left_out):,} tensors of other layers", ""))
    if plan.copied:
        rows.append(("copied", "", ", ".join(plan.copied)))
    if plan.left_behind:
        rows.append(("left behind", ", ".join(plan.left_behind), ""))
    table = new_table("", "read", "written")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(*(escape(harmless(cell)) for cell in row))
    return table


def merged_table(merged: "Sequence[MergedTensor]") -> "Table":
    """What an adapter changed, by projection: how many tensors, and how far each moved."""
    table = new_table("merged")
    for heading in ("tensors", "change,\nleast", "change,\nmedian", "change,\nmost"):
        table.add_column(heading, justify="right", no_wrap=True)
    by_projection: dict[str, list[MergedTensor]] = {}
    for tensor in merged:
        by_projection.setdefault(_projection(tensor.name), []).append(tensor)
    for projection, tensors in by_projection.items():
        changes = [t.change for t in tensors if t.change is not None]
        sizes = (min(changes), statistics.median(changes), max(changes)) if changes else ()
        shown = [f"{100 * size:.3g} %" for size in sizes] or ["replaced", "", ""]
        table.add_row(projection, f"{len(tensors):,}", *shown)
    return table


def _tell(plan: "Conversion", merged: "Sequence[MergedTensor]") -> None:
    """What was done, and how it was proven."""
    if merged:
        table = merged_table(merged)
        console_for(table).print(table)
        print(
            f"every merged tensor is the fp64 sum of base and adapter, rounded: the largest error "
            f"is {max(m.error for m in merged):.2f} of what rounding allows"
        )
        still = [m.name for m in merged if m.change == 0]
        if still:
            print(f"{len(still):,} of them did not change: the adapter is 0 there, or too small")
    count = f"{len(plan.pieces):,} tensors"
    print(f"{count} written to {harmless(str(plan.target))}, read again and equal to the bit")


def _projection(name: str) -> str:
    """`backbone.layers.3.mixer.experts.7.up_proj.weight` -> `experts.up_proj`."""
    parts = [p for p in name.removesuffix(".weight").split(".") if not p.isdecimal()]
    return ".".join(parts[parts.index("mixer") + 1 :]) if "mixer" in parts else parts[-1]


def _read_bytes(plan: "Conversion") -> int:
    """As they are stored, whatever width they are read in."""
    stored = plan.checkpoint.stored
    return sum(entry.end - entry.begin for entry in map(stored.entry, stored))


def _layers_read(plan: "Conversion") -> str:
    if plan.layers is None:
        return f"{plan.config.num_hidden_layers:,}"
    return ", ".join(map(str, plan.layers))


def _layer_numbers(plan: "Conversion") -> list[int]:
    """Of the source, in order."""
    return list(range(plan.config.num_hidden_layers) if plan.layers is None else plan.layers)


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each thing that is done, in bytes."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=new_console(stderr=True)) as progress:
        tasks = {}

        def report(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done)

        yield report
