"""An evaluation as tables, and what the reader has to know beside them."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.markup import escape

from nemotron_v3.cli.terminal import harmless, new_table

if TYPE_CHECKING:
    from rich.table import Table

    from nemotron_v3.evaluation.result import Evaluation, TextResult

TOLD_BAD = 3


def tables(found: "Evaluation") -> "list[Table]":
    """One table for each source, and one for the tasks; a row a checkpoint, or a figure."""
    made = [_of_source(found, number) for number in range(len(found.sources))]
    if any(checkpoint.tasks for checkpoint in found.checkpoints):
        made.append(_of_tasks(found))
    return made


def _of_source(found: "Evaluation", number: int) -> "Table":
    first = found.checkpoints[0].texts[number]
    title = f"{found.sources[number]['path']}: {first.documents:,} documents, {first.bytes:,} bytes"
    table = new_table("checkpoint", title=escape(harmless(title)))
    for heading in ("perplexity", "bits/\nbyte", "bits/\ntoken", "tokens", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for checkpoint in found.checkpoints:
        text = checkpoint.texts[number]
        tokens, speed = sum(each.tokens for each in checkpoint.texts), ""
        if checkpoint.seconds and not checkpoint.tasks:
            speed = f"{tokens / checkpoint.seconds:,.0f}"
        table.add_row(
            escape(harmless(checkpoint.name)),
            figure(text.perplexity),
            figure(text.bits_per_byte),
            figure(text.bits_per_token),
            f"{text.tokens:,}",
            speed,
        )
    return table


def _of_tasks(found: "Evaluation") -> "Table":
    """A row a figure, a column a checkpoint."""
    table = new_table("task", "metric")
    table.add_column("shots", justify="right")
    for checkpoint in found.checkpoints:
        table.add_column(escape(harmless(checkpoint.name)), justify="right", overflow="fold")
    rows = {
        (each.task, each.name, each.filter): each
        for checkpoint in found.checkpoints
        for each in checkpoint.tasks
    }
    by_name = [{(t.task, t.name, t.filter): t for t in c.tasks} for c in found.checkpoints]
    for key, told in rows.items():
        name = told.name if told.filter == "none" else f"{told.name} ({told.filter})"
        cells = []
        for tasks in by_name:
            each = tasks.get(key)
            cells.append("" if each is None else _with_error(each.value, each.stderr))
        shots = "" if told.fewshot is None else str(told.fewshot)
        table.add_row(escape(harmless(told.task)), escape(harmless(name)), shots, *cells)
    return table


def _with_error(value: float | None, stderr: float | None) -> str:
    shown = figure(math.nan if value is None else value)
    return shown if stderr is None else f"{shown} ± {stderr:.4f}"


def figure(value: float) -> str:
    """Four digits behind the point where there is room for them."""
    if math.isfinite(value) and abs(value) >= 1e6:
        return f"{value:.4g}"
    return f"{value:,.4f}"


def notes(found: "Evaluation") -> Iterator[str]:
    """What a reader of the tables could be misled by."""
    for number, source in enumerate(found.sources):
        texts = [checkpoint.texts[number] for checkpoint in found.checkpoints]
        if len({(text.tokens, text.documents) for text in texts}) > 1:
            yield f"{source['path']}: the tokenizers differ; bits per byte alone can be compared"
        for checkpoint, text in zip(found.checkpoints, texts, strict=True):
            yield from _of_text(f"{source['path']}, {checkpoint.name}", text)
        text = texts[0]
        if text.left_out:
            yield f"{source['path']}: {text.left_out:,} documents have no text or target: left out"
        if text.bad:
            told = "".join(f"\n  - {line}" for line in text.bad[:TOLD_BAD])
            more = len(text.bad) - TOLD_BAD
            told += f"\n  - and {more} more" if more > 0 else ""
            yield f"{source['path']}: {len(text.bad):,} lines are bad and left out:{told}"


def _of_text(where: str, text: "TextResult") -> Iterator[str]:
    if not math.isfinite(text.nats):
        places = enumerate(text.per_document.nats, 1)
        first = next((n for n, nats in places if not math.isfinite(nats)), None)
        yield f"{where}: the scores are not finite, first in document {first}"
    if text.first_unscored:
        yield (
            f"{where}: nothing predicts the first token of {text.first_unscored:,} documents, "
            "which is not scored: --bos puts one before it"
        )
