"""What an evaluation is asked for, as plain values."""

from dataclasses import dataclass
from pathlib import Path

from nemotron_v3.data.options import Source, TrainOn

WINDOW = 8192


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, with an adapter merged into it where one is named."""

    path: Path
    adapter: Path | None = None


@dataclass(frozen=True)
class TaskOptions:
    """Tasks of lm-evaluation-harness.

    Attributes:
        names: of tasks, groups and tags, as the harness knows them.
        include_path: a folder with definitions of further tasks.
        fewshot: examples before each question; None is as each task says.
        limit: questions of each task, from 1 on, or a part of them below 1; None is all.
        chat_template: whether the questions are put as chats by the checkpoint's template.
        fewshot_as_multiturn: whether examples are turns of the chat.
        system: the system message, or text in front of each question.
        seed: of the examples' choice.
        batch_size: requests that go on at a time; it changes no figure.

    Raises:
        ValueError: a value that none can have.
    """

    names: tuple[str, ...]
    include_path: Path | None = None
    fewshot: int | None = None
    limit: float | None = None
    chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system: str | None = None
    seed: int = 1234
    batch_size: int = 32

    def __post_init__(self) -> None:
        if not self.names:
            raise ValueError("there are no tasks: give at least one name")
        if self.fewshot is not None and self.fewshot < 0:
            raise ValueError(f"fewshot is {self.fewshot}: give 0 or more examples")
        if self.limit is not None and not self.limit > 0:
            raise ValueError(
                f"limit is {self.limit}: give a number of questions, or a part below 1"
            )
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: give at least 1")
        if self.fewshot_as_multiturn and not self.chat_template:
            raise ValueError("fewshot_as_multiturn makes turns of a chat: give chat_template too")


@dataclass(frozen=True)
class EvalOptions:
    """What is measured, and how.

    Attributes:
        sources: documents to score; their weights count for nothing.
        tasks: of the harness, or None.
        window: tokens of a pass through the model; it changes no figure.
        dtype: of the weights, as torch's name; None is the checkpoint's.
        device: None is a GPU where there is one.
        bos: begin each document with the config's bos token, where the tokenizer adds nothing.
        chat_template: for chats: a template's file, a folder that has one, or the template; None
            is the checkpoint's.
        train_on: in chats, whether the assistant's words alone are scored, or all tokens.
        workers: processes that read and tokenise; 0 does it in this one.

    Raises:
        ValueError: nothing to measure, or a value that none can have.
    """

    sources: tuple[Source, ...] = ()
    tasks: TaskOptions | None = None
    window: int = WINDOW
    dtype: str | None = None
    device: str | None = None
    bos: bool = False
    chat_template: str | None = None
    train_on: TrainOn = "assistant"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.sources and self.tasks is None:
            raise ValueError("there is nothing to measure: give data or tasks")
        if self.window < 1:
            raise ValueError(f"window is {self.window}: give at least 1 token")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}: give 0 or more")
