"""Checkpoints that a run resumes from: tensors by torch.distributed.checkpoint, the rest as JSON.

    checkpoints/step-00000500/            whole, by a rename
    checkpoints/.saving-step-00001000/    being written, or left by a kill

A save is written to a hidden folder, synced to the disk and renamed, so that a folder with a
step's name is whole. What a kill has left is removed by the next run.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from nemotron_v3.config.files import read_object
from nemotron_v3.config.typed import from_object
from nemotron_v3.train.loop import Progress
from nemotron_v3.train.options import SaveOptions
from nemotron_v3.train.processes import World

FOLDER = "checkpoints"
STATE = "state.json"
_SAVING, _REMOVING = ".saving-", ".removing-"
_STEP = re.compile(r"step-(\d{8,})")


def saved_steps(folder: Path) -> list[int]:
    """The steps that the run in a folder can be gone on from, rising."""
    if not (folder / FOLDER).is_dir():
        return []
    saves = (path for path in (folder / FOLDER).iterdir() if path.is_dir())
    found = (_STEP.fullmatch(path.name) for path in saves)
    return sorted(int(match[1]) for match in found if match)


@dataclass
class Checkpoints:
    """The saves of one run.

    Args:
        folder: of the run.
        identity: what a run that goes on has to share, such as sizes of the model: text by name.
            What the data has to share is in the data's own state.
    """

    folder: Path
    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    options: SaveOptions
    identity: dict[str, str]

    def __post_init__(self) -> None:
        self._pending: tuple[Future, int] | None = None
        self._last: int | None = None  # step that is saved
        # Saves in the background speak on a line of their own.
        group = dist.new_group(backend="gloo") if self.world.size > 1 else None
        if isinstance(group, int):
            raise RuntimeError(f"rank {self.world.rank} is not among the processes that save")
        self._group = group

    # ------------------------------------------------------------------------------------- saving

    def save(self, progress: Progress) -> None:
        """Save the state behind a finished step; in the background where that is asked for.

        Raises:
            OSError: the disk refuses; the saves before are as they were.
        """
        self.finish()
        step = progress.step
        if step == self._last:
            return
        saving = self._path(step, _SAVING)
        if self.world.first:
            saving.mkdir(parents=True)
            content = {"progress": asdict(progress), "identity": self.identity}
            self._guard(lambda: (saving / STATE).write_text(json.dumps(content)), step)
        self.world.wait()
        state = self._state()
        writer = FileSystemWriter(saving, sync_files=True)
        kind: dict[str, Any] = {
            "storage_writer": writer,
            "process_group": self._group,
            "no_dist": self.world.size == 1,
        }
        with _quiet():
            if self.options.background:
                future = state_dict_saver.async_save(state, **kind)
                if not isinstance(future, Future):
                    raise TypeError(f"torch saves by a {type(future).__name__}, and no future")
                self._pending = future, step
                return
            self._guard(lambda: state_dict_saver.save(state, **kind), step)
        self._put_in_place(step)

    def poll(self) -> None:
        """Put a save in its place that was finished meanwhile. Raises OSError as `save` does."""
        if self._pending is not None and self._pending[0].done():
            self.finish()

    def finish(self, seconds: float | None = None) -> None:
        """Wait for the save that is under way, at most so long. Raises OSError as `save` does."""
        if self._pending is None:
            return
        future, step = self._pending
        self._pending = None
        self._guard(lambda: future.result(seconds), step)
        self._put_in_place(step)

    def _guard(self, write: Any, step: int) -> None:
        """Run what writes; a failure removes what was written and names the disk's reason."""
        try:
            write()
        except (Exception, CheckpointException) as error:  # which is none of the former
            saving = self._path(step, _SAVING)
            shutil.rmtree(saving, ignore_errors=True)
            reason = _disk_error(error)
            if reason is None:
                raise
            number = reason.errno or errno.EIO
            raise OSError(number, os.strerror(number), str(saving)) from error

    def _put_in_place(self, step: int) -> None:
        if not self.world.first:
            self._last = step
            return
        saving, place = self._path(step, _SAVING), self._path(step)

        def rename() -> None:
            _sync(saving / STATE)
            _sync(saving)
            saving.rename(place)

        self._guard(rename, step)
        self._last = step
        _sync(place.parent)
        self._prune(json.loads((place / STATE).read_text())["progress"]["best_step"])

    def _prune(self, best: int | None) -> None:
        steps = saved_steps(self.folder)
        kept = set(steps[-self.options.keep :])
        if self.options.keep_best and best is not None:
            kept.add(best)
        for step in set(steps) - kept:
            # Renamed first, so that no folder with a step's name is ever half there.
            removing = self._path(step, _REMOVING)
            self._path(step).rename(removing)
            shutil.rmtree(removing)

    # ------------------------------------------------------------------------------------ loading

    def load(self) -> Progress | None:
        """Bring model and optimiser to the last save; None where there is none.

        Raises:
            ValueError: it is the save of another model or of other data, or it is not as it was
                written.
        """
        if self.world.first:
            for left in (self.folder / FOLDER).glob(".*-step-*"):
                shutil.rmtree(left)
        steps = self.world.told(saved_steps(self.folder))
        if not steps:
            return None
        place = self._path(steps[-1])
        with self._whole(steps):
            content = read_state(place / STATE, steps[-1])
        self._check(place, content.identity)
        state = self._state()
        with _quiet(), self._whole(steps):
            state_dict_loader.load(
                state,
                storage_reader=FileSystemReader(place),
                process_group=self._group,
                no_dist=self.world.size == 1,
            )
        asked = [_settings(group) for group in self.optimizer.param_groups]
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(ignore_frozen_params=True, strict=False),
        )
        # The save has those of the run as it was begun: what is asked for now counts.
        for group, settings in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(settings)
        self._last = steps[-1]
        return content.progress

    @contextlib.contextmanager
    def _whole(self, steps: list[int]) -> Iterator[None]:
        """Say which of the saves cannot be read, and what the run goes on from without it."""
        try:
            yield
        except (Exception, CheckpointException) as error:  # which is none of the former
            disk = _disk_error(error)
            if disk is not None and not isinstance(disk, FileNotFoundError):
                raise disk from error
            reasons = _within(error)
            if any(isinstance(each, MemoryError | torch.OutOfMemoryError) for each in reasons):
                raise
            before = f"from step {steps[-2]}" if len(steps) > 1 else "from its beginning"
            raise ValueError(
                f"{self._path(steps[-1])} cannot be gone on from ({_first_line(reasons[-1])}): "
                f"move it away, and the run goes on {before}"
            ) from error

    def _check(self, place: Path, identity: dict[str, str]) -> None:
        other = [
            f"{name} was {identity.get(name)}, and is {value}"
            for name, value in self.identity.items()
            if identity.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{place} is of another run: {'; '.join(other)}. Give another --out, or what the "
                "run was begun with"
            )

    def _state(self) -> dict[str, Any]:
        """What is saved of model and optimiser: of frozen parameters nothing."""
        options = StateDictOptions(ignore_frozen_params=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=options)
        return {"model": model, "optimizer": optimizer}

    def _path(self, step: int, before: str = "") -> Path:
        return self.folder / FOLDER / f"{before}step-{step:08d}"


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What an optimiser was asked for of a group of parameters: rates, decay, momentum."""
    return {name: value for name, value in group.items() if name != "params"}


@dataclass(frozen=True)
class State:
    """What state.json holds."""

    progress: Progress
    identity: dict[str, str]


def read_state(path: Path, step: int) -> State:
    """The state of the save behind a step.

    Raises:
        ValueError: no such state, or one of another step, or with a value that none can have.
        OSError: it cannot be read.
    """
    told = read_object(path)
    if isinstance(given := told.get("progress"), dict):  # an earlier version may have had fewer
        told["progress"] = asdict(Progress()) | given
    state = from_object(State, told, path.name)
    found = state.progress
    if found.step != step:
        raise ValueError(f"{path.name} is of step {found.step}")
    if found.tokens < 0 or not 0 <= found.seconds < math.inf:
        raise ValueError(f"{path.name} counts {found.tokens} tokens, {found.seconds} seconds")
    for name in ("best_step", "validated"):
        if not 0 <= (getattr(found, name) or 0) <= step:
            raise ValueError(f"{path.name} has {name} {getattr(found, name)}")
    return state


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _disk_error(error: BaseException) -> OSError | None:
    """The operating system's word in an error, or in those that it holds or that led to it."""
    for each in _within(error):
        if isinstance(each, OSError):
            return each
    told = str(error)
    if "inline_container" in told or "PytorchStreamWriter" in told:  # torch's writer of files
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def _within(error: BaseException) -> list[BaseException]:
    """An error, those that it holds, and those that led to it."""
    seen: list[BaseException] = [error]
    for each in seen:
        held = getattr(each, "failures", None) or {}
        inner = [pair[0] if isinstance(pair, tuple) else pair for pair in held.values()]
        inner += [each.__cause__, each.__context__]
        seen += [e for e in inner if isinstance(e, BaseException) and e not in seen]
    return seen


def _sync(path: Path) -> None:
    """Wait until the file's bytes, or the folder's names, are on the disk."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks that a single process saves; one comes from a thread of its own,
    which no context reaches."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
