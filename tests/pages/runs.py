"""Folders of runs made up on the spot, as training writes them."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

from nemotron_v3.train.config_file import config_text
from nemotron_v3.train.options import ModelOptions, ScheduleOptions, TrainOptions
from tests.train.fakes import made_up_options


def line_of(step: int, **more: Any) -> dict[str, Any]:
    """A line as a step leaves it, a function of the step."""
    drawn = random.Random(step)
    line = {
        "step": step,
        "tokens": 512 * step,
        "targets": 500,
        "seconds": 0.5,
        "loss": 2 + 6 / math.sqrt(step) + 0.2 * drawn.random(),
        "learning_rate": 1e-3 / step,
        "gradient_norm": 1 + drawn.random(),
        "tokens_per_second": 1000 + 50 * drawn.random(),
        "mfu": 0.4 + 0.01 * drawn.random(),
    }
    if step == 1 or step % 10 == 0:
        kinds = ("attention", "experts", "mamba", "router")
        line |= {f"gradient_norm/{kind}": drawn.random() + 0.01 for kind in kinds}
        line |= {"experts/entropy": 0.9, "experts/max_violation": 0.5, "experts/idle": 1.0}
        line["experts/load"] = {}
        for layer in ("1", "3", "10"):
            line[f"experts/entropy/{layer}"] = 0.8 + 0.2 * drawn.random()
            line[f"experts/max_violation/{layer}"] = drawn.random()
            line["experts/load"][layer] = [drawn.randrange(0, 200) for _ in range(8)]
        line |= {"memory_bytes": 3 * 2**30 + step, "data": {"rows": 4 * step}}
    return line | more


def write_run(folder: Path, lines: list[dict[str, Any]], steps: int = 100, **start: Any) -> Path:
    """A run's folder with these lines; `start` goes into the last entry of run.json."""
    folder.mkdir(parents=True)
    options = TrainOptions(
        out=folder,
        data=made_up_options(),
        model=ModelOptions(path=Path("base")),
        schedule=ScheduleOptions(steps=steps),
    )
    (folder / "train.toml").write_text(config_text(options), encoding="utf-8")
    about = {"started": "2026-01-02T03:04:05Z", "command": ["nemotron-v3", "train"], "python": "3"}
    about |= {"versions": {"torch": "2.11.0", "nemotron-v3": "0.1.0"}, "commit": "abc"}
    (folder / "run.json").write_text(json.dumps([about | start]), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def make_old(folder: Path, seconds: float) -> None:
    """As if the run's last line had been written so long ago."""
    path = folder / "metrics.jsonl"
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))
