"""`nemotron-v3 eval`: checkpoints side by side, on texts and on tasks."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from nemotron_v3.cli.dtypes import DTYPES, dtype_name
from nemotron_v3.cli.options import Choices
from nemotron_v3.cli.terminal import console_for, harmless, new_console
from nemotron_v3.cli.threads import settle_threads
from nemotron_v3.data.options import Format, Source, TrainOn

if TYPE_CHECKING:
    from nemotron_v3.evaluation import Candidate, EvalOptions, Evaluation


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Measure checkpoints side by side: perplexity and bits per byte of texts, and tasks.

    Every token is scored with all that stands before it in its document, however long that is.
    Under torchrun the processes share the documents. A table goes to stdout.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """folders of checkpoints"""
    data: tuple[str, ...] = ()
    """texts to score: files, folders or globs of text, JSONL or Parquet, or data sets"""
    tasks: tuple[str, ...] = ()
    """tasks of lm-evaluation-harness, which has to be installed: pip install 'nemotron-v3[eval]'"""
    include_path: Path | None = None
    """folder with definitions of further tasks"""
    adapter: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """folder of a LoRA adapter in PEFT's format, as often as there are some: the checkpoint is
    measured without it and with it"""
    out: Path | None = None
    """JSON file to write, with every document's score"""
    json: bool = False
    """print the JSON in place of the table"""
    resume: bool = False
    """go on with what an interrupted evaluation left beside --out"""
    overwrite: bool = False
    """replace the file in --out"""
    format: Format = "auto"
    """of the data; auto goes by the ending of each file"""
    field: str = "text"
    """key or column of the data that holds a document's text, or a chat's messages"""
    split: str = "train"
    """of a data set"""
    bos: bool = False
    """begin each document with the config's bos token, where tokenizer.json adds nothing"""
    chat_template: str | None = None
    """for chats: a template's file, or a folder that has one; the checkpoint's by default"""
    train_on: TrainOn = "assistant"
    """which words of chats are scored"""
    window: int = 8192
    """tokens of a pass through the model; it changes memory and speed, and no figure"""
    num_fewshot: int | None = None
    """examples before each question of a task; as the task says by default"""
    limit: float | None = None
    """questions of each task: a number, or below 1 a part of them"""
    apply_chat_template: bool = False
    """put the questions of tasks as chats"""
    fewshot_as_multiturn: bool = False
    """make the examples of a task turns of the chat"""
    system: str | None = None
    """the system message of tasks"""
    batch_size: int = 32
    """requests of tasks that go on at a time; it changes memory and speed, and no figure"""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; cuda where there is one"""
    dtype: Annotated[str | None, Choices(tuple(DTYPES))] = None
    """of the weights: bfloat16, float16, float32 or float64 (bf16, fp16, ...); the checkpoint's by
    default"""
    threads: int | None = None
    """of a CPU; else all cores"""
    workers: int = 0
    """processes that read and tokenise"""

    def run(self) -> None:
        """Measure, and show what was found."""
        candidates, options = self.candidates(), self.options()
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}: give at least 1")
        settle_threads(self.threads)
        from nemotron_v3.evaluation import evaluate
        from nemotron_v3.train.interrupts import Stopped

        if self.device is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
            from nemotron_v3.cli.generate import check_device

            check_device(self.device)
        try:
            with _progress() as tell:
                found = evaluate(
                    candidates,
                    options,
                    self.out,
                    resume=self.resume,
                    overwrite=self.overwrite,
                    tell=tell,
                )
        except Stopped as stopped:
            print(f"nemotron-v3: interrupted: {stopped}", file=sys.stderr)
            sys.exit(128 + stopped.number)
        if found is not None:
            self._show(found)

    def candidates(self) -> "list[Candidate]":
        """What is measured; raises `ValueError` for adapters that belong to no one checkpoint."""
        from nemotron_v3.evaluation import Candidate

        if not self.paths:
            raise ValueError("there is no checkpoint: give at least one folder")
        if self.adapter and len(self.paths) > 1:
            raise ValueError(
                f"--adapter belongs to one checkpoint, and there are {len(self.paths)}: give one "
                "PATH, or merge the adapters first (nemotron-v3 convert --adapter)"
            )
        alone = [Candidate(path) for path in self.paths]
        return alone + [Candidate(alone[0].path, adapter) for adapter in self.adapter]

    def options(self) -> "EvalOptions":
        """In the words of the room that measures; raises `ValueError`."""
        from nemotron_v3.evaluation import EvalOptions, TaskOptions

        of_tasks = {
            "--include-path": self.include_path,
            "--num-fewshot": self.num_fewshot,
            "--limit": self.limit,
            "--apply-chat-template": self.apply_chat_template or None,
            "--fewshot-as-multiturn": self.fewshot_as_multiturn or None,
            "--system": self.system,
        }
        given = [name for name, value in of_tasks.items() if value is not None]
        if given and not self.tasks:
            raise ValueError(f"{', '.join(given)} is for tasks: give --tasks too")
        if not self.data and not self.tasks:
            raise ValueError("there is nothing to measure: give --data or --tasks")
        tasks = None
        if self.tasks:
            tasks = TaskOptions(
                names=self.tasks,
                include_path=self.include_path,
                fewshot=self.num_fewshot,
                limit=self.limit,
                chat_template=self.apply_chat_template,
                fewshot_as_multiturn=self.fewshot_as_multiturn,
                system=self.system,
                batch_size=self.batch_size,
            )
        return EvalOptions(
            sources=tuple(Source(p, self.format, self.field, split=self.split) for p in self.data),
            tasks=tasks,
            window=self.window,
            dtype=None if self.dtype is None else dtype_name(self.dtype),
            device=self.device,
            bos=self.bos,
            chat_template=self.chat_template,
            train_on=self.train_on,
            workers=self.workers,
        )

    def _show(self, found: "Evaluation") -> None:
        from nemotron_v3.cli.eval_table import notes, tables

        if self.json:
            print(json.dumps(found.to_dict(), allow_nan=False))
        else:
            shown = tables(found)
            console = console_for(*shown, narrowest=60)
            for table in shown:
                console.print(table)
        for note in notes(found):
            print(f"nemotron-v3: {harmless(note)}", file=sys.stderr)
        if self.out is not None and not self.json:
            print(f"written to {harmless(str(self.out))}")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each thing that is done; it goes away when all are."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    ]
    console = new_console(stderr=True)
    with Progress(*columns, console=console, transient=True) as progress:
        tasks: dict[str, Any] = {}

        def told(doing: str, done: int, total: int) -> None:
            if doing not in tasks:
                tasks[doing] = progress.add_task(harmless(doing), total=total)
            progress.update(tasks[doing], completed=done, total=total)

        yield told
