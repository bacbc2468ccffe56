"""`nemotron-v3 convert`: a checkpoint in another spelling, or with an adapter merged into it."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from nemotron_v3.checkpoint import Conversion

_DTYPES = ("bfloat16", "float16", "float32", "float64")


def convert(
    source: Path,
    target: Path,
    /,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    experts: Literal["per_expert", "fused"] | None = None,
    prefix: Literal["backbone", "model"] | None = None,
    layers: str | None = None,
    adapter: Path | None = None,
    dequantise: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint in another spelling, streamed and proven; what is not asked for stays.

    Args:
        source: directory with config.json and safetensors weights.
        target: directory to write to.
        dtype: of the weights: bfloat16, float16, float32 or float64. A_log, D, dt_bias and the
            router's bias stay fp32 or wider.
        max_shard_size: such as 5GB or 500MB.
        experts: one tensor for each expert, or one stack.
        prefix: what names begin with.
        layers: only these, such as 0-3,7; they are renumbered from 0.
        adapter: directory of a LoRA adapter in PEFT's format, to merge.
        dequantise: write weights in 8 or 4 bits with their values; without it they stay as they
            are, and only max_shard_size may be asked for.
        dry_run: show what would be done, and write nothing.
        overwrite: replace what is in the target.
    """
    import torch
    from rich.console import Console

    from nemotron_v3.checkpoint import plan_conversion

    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}: give one of {', '.join(_DTYPES)}")
    plan = plan_conversion(
        source,
        target,
        dtype=getattr(torch, dtype) if dtype else None,
        max_shard_size=max_shard_size,
        experts=experts,
        prefix=f"{prefix}." if prefix else None,
        layers=None if layers is None else parse_layers(layers),
        adapter=adapter,
        dequantise=dequantise,
        overwrite=overwrite,
    )
    console = Console(highlight=False)
    console.print(plan_table(plan))
    if dry_run:
        console.print("dry run: nothing was written")
        return
    with _progress(console) as progress:
        plan.run(progress)
    console.print(
        f"{len(plan.pieces):,} tensors written to {target}, read again and equal to the bit",
        markup=False,
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


def plan_table(plan: "Conversion") -> "Table":
    """What is read beside what is written."""
    from rich.markup import escape
    from rich.table import Table

    from nemotron_v3.checkpoint.names import majority_dtype
    from nemotron_v3.checkpoint.writer import numel

    checkpoint, origin = plan.checkpoint, plan.origin
    depth = plan.config.num_hidden_layers
    entries = map(checkpoint.stored.entry, checkpoint.stored)
    read_bytes = sum(entry.end - entry.begin for entry in entries)
    written = majority_dtype((p.dtype, numel(p)) for p in plan.pieces)
    rows = [
        ("tensors", f"{len(checkpoint.stored):,}", f"{len(plan.pieces):,}"),
        ("bytes", f"{read_bytes:,}", f"{plan.bytes:,}"),
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
    table = Table(title=escape(f"{checkpoint.path} -> {plan.target}"), title_justify="left")
    for heading in ("", "read", "written"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _layers_read(plan: "Conversion") -> str:
    if plan.layers is None:
        return f"{plan.config.num_hidden_layers:,}"
    return ", ".join(map(str, plan.layers))


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def _progress(console: "Console") -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each thing that is done, in bytes."""
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
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def told(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(doing, total=total)
            progress.update(tasks[doing], completed=done)

        yield told
