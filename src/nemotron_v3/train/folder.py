"""The folder of a run: what it was asked, with which versions, and whether it may be written to."""

import json
import os
import platform
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import read_text
from nemotron_v3.config.versions import installed
from nemotron_v3.train.checkpoints import FOLDER
from nemotron_v3.train.config_file import config_text
from nemotron_v3.train.metrics import METRICS
from nemotron_v3.train.options import TrainOptions

CONFIG = "train.toml"
ABOUT = "run.json"
_PACKAGES = ("nemotron-v3", "torch", "triton", "safetensors", "tokenizers", "transformers", "peft",
             "torchao", "datasets")  # fmt: skip


def check_folder(out: Path, resume: bool) -> None:
    """Raise ValueError where a run may not be written to `out`."""
    if resume:
        if not (out / CONFIG).is_file():
            raise ValueError(f"{out} has no {CONFIG}: there is no run to resume")
        return
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give another --out")
    if (out / CONFIG).exists() or (out / METRICS).exists() or (out / FOLDER).exists():
        raise ValueError(
            f"{out} holds a run: --resume goes on with it; give another --out for a new one"
        )
    # What a kill left of an earlier beginning is hidden.
    if out.exists() and any(not path.name.startswith(".") for path in out.iterdir()):
        raise ValueError(f"{out} holds something else than a run: give another --out")


def write_about(options: TrainOptions, resumed: bool) -> dict[str, Any]:
    """Write the configuration whole, and what it runs with; gives the latter.

    Raises:
        ValueError: run.json is not as a run writes it; nothing is written then.
        OSError: the disk refuses.
    """
    about = options.out / ABOUT
    starts = _starts(about) if resumed and about.exists() else []
    options.out.mkdir(parents=True, exist_ok=True)
    with atomic_file(options.out / CONFIG) as path:
        path.write_text(config_text(options), encoding="utf-8")
    starts.append(_about())
    with atomic_file(about) as path:
        path.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")
    return starts[-1]


def write_outcome(out: Path, outcome: str) -> None:
    """Say how what was begun last has ended; a run that was killed says nothing.

    Raises:
        ValueError: run.json is not as a run writes it any more.
        OSError: the disk refuses.
    """
    about = out / ABOUT
    starts = _starts(about) or [{}]
    starts[-1] |= {"ended": _now(), "outcome": outcome}
    with atomic_file(about) as path:
        path.write_text(json.dumps(starts, indent=2) + "\n", encoding="utf-8")


def _starts(path: Path) -> list[dict[str, Any]]:
    try:
        starts = json.loads(read_text(path))
    except (ValueError, RecursionError):
        starts = None
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        raise ValueError(
            f"{path} is no list of JSON objects, one each time the run was begun: delete it to go "
            "on without what it told"
        )
    return starts


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _about() -> dict[str, Any]:
    return {
        "started": _now(),
        # By these a page of the run tells whether it goes on.
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": f"{platform.platform()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": installed(_PACKAGES),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Of the package's own checkout; None where it is no checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
