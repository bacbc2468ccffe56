"""A run's folder, put in its place only when it is whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron_v3.config.atomic import atomic_folder, put_in_place, settle

# A folder with this file in it was written by a run, and a later run may replace it.
METRICS = "metrics.jsonl"
# What an interrupted run has when its checkpoint is on disk.
CHECKPOINT = ("config.json", "model.safetensors")


@contextmanager
def atomic_run_folder(out: Path) -> Iterator[Path]:
    """Give a new folder beside `out` to write a run into, and rename it to `out` at the end.

    Whatever goes wrong before the end leaves `out` as it was. Ctrl-C does too, and moves what was
    written beside it, to `interrupted(out)`, if there is a checkpoint among it; the message of the
    `KeyboardInterrupt` then says so.

    Raises:
        ValueError: `out` holds something that no run wrote.
    """
    for place in (out, interrupted(out)):
        settle(place)
        _check_replaceable(place)
    with atomic_folder(out) as folder:
        try:
            yield folder
        except KeyboardInterrupt:
            if all((folder / name).is_file() for name in CHECKPOINT):
                put_in_place(folder, interrupted(out))
                raise KeyboardInterrupt(f"the checkpoint so far is in {interrupted(out)}") from None
            raise


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
