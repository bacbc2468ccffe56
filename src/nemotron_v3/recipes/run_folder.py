"""A run's folder, put in its place only when it is whole."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# A folder with this file in it was written by a run, and a later run may replace it.
METRICS = "metrics.jsonl"
# What an interrupted run has when its checkpoint is on disk.
CHECKPOINT = ("config.json", "model.safetensors")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out` to write a run into, and rename it to `out` at the end.

    Whatever goes wrong before the end leaves `out` as it was. Ctrl-C does too, and moves what was
    written beside it, to `interrupted(out)`, if there is a checkpoint among it; the message of the
    `KeyboardInterrupt` then says so.

    Raises:
        ValueError: `out` holds something that no run wrote.
    """
    _check_replaceable(out)
    _check_replaceable(interrupted(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    folder = scratch / out.name
    folder.mkdir()
    try:
        yield folder
        _replace(out, folder, scratch)
    except KeyboardInterrupt:
        if all((folder / name).is_file() for name in CHECKPOINT):
            _replace(interrupted(out), folder, scratch)
            raise KeyboardInterrupt(f"the checkpoint so far is in {interrupted(out)}") from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def interrupted(out: Path) -> Path:
    """Where an interrupted run of `out` is kept: beside it, so that a finished one stays."""
    return out.with_name(f"{out.name}-interrupted")


def _check_replaceable(folder: Path) -> None:
    if not folder.exists() or (folder / METRICS).is_file():
        return
    if folder.is_dir() and not any(folder.iterdir()):
        return
    raise ValueError(
        f"{folder} exists and holds something else than an earlier run (no {METRICS} in it), which "
        "a new run would replace: give another --out"
    )


def _replace(place: Path, folder: Path, scratch: Path) -> None:
    """Rename `folder` to `place`; what was there goes aside first, and back if that fails."""
    aside = scratch / "before"
    if place.exists():
        place.rename(aside)
    try:
        folder.rename(place)
    except BaseException:
        if aside.exists():
            aside.rename(place)
        raise
