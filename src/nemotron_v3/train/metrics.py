"""What a run has measured, a line of JSON a step, and where else it is shown."""

import json
import os
import secrets
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.model.cost import training_flops
from nemotron_v3.train.loop import Step
from nemotron_v3.train.options import LogOptions

METRICS = "metrics.jsonl"
WANDB = "wandb-run.txt"  # the id of the run in Weights & Biases

# Dense bf16 TFLOP/s as their makers state them, by a part of the name that torch gives.
PEAK_TFLOPS = {
    "H200": 989.5, "H100 PCIe": 756.0, "H100": 989.5, "H20": 148.0, "B200": 2250.0, "GB200": 2250.0,
    "A100": 312.0, "A800": 312.0, "L40S": 362.0, "L4": 121.0, "A10": 125.0, "RTX 4090": 165.2,
}  # fmt: skip


def peak_flops(device_name: str, told: float | None) -> float | None:
    """FLOP/s of one device; None where nobody knows them."""
    if told is not None:
        return told * 1e12
    peak = next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
    return None if peak is None else peak * 1e12


class Recorder:
    """Writes metrics.jsonl, and to TensorBoard and Weights & Biases where that is asked for.

    Args:
        folder: of the run.
        options: what to write.
        config: of the model, for its FLOPs.
        step: that the run goes on from: later lines, of steps that were lost, are taken out.
        peak: FLOP/s of all devices together, or None.
        about: of the run, for Weights & Biases.
    """

    def __init__(
        self,
        folder: Path,
        options: LogOptions,
        config: NemotronV3Config,
        step: int,
        peak: float | None,
        about: Mapping[str, Any],
    ):
        self._options, self._config, self._peak = options, config, peak
        self._file = reopened(folder / METRICS, step)
        self._board = None
        if options.tensorboard:
            self._board = _summary_writer()(str(folder / "tensorboard"), purge_step=step + 1)
        self._wandb = _wandb(options.wandb, folder, about) if options.wandb else None

    def step(self, step: Step, position: Mapping[str, Any]) -> None:
        """Of a finished step; `position` is where the data stands."""
        if step.step % self._options.every and not step.details:
            return
        line = {
            "step": step.step,
            "tokens": step.total_tokens,
            "targets": step.targets,
            "seconds": step.seconds,
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "gradient_norm": step.gradient_norm,
            "tokens_per_second": step.tokens / step.seconds,
        }
        if (used := self.utilisation(step)) is not None:
            line["mfu"] = used
        if step.details:
            line |= step.details | {"data": dict(position)}
        self.write(line)

    def utilisation(self, step: Step) -> float | None:
        """Model FLOPs utilisation: a forward pass and two for the backward, by the peak."""
        if self._peak is None:
            return None
        flops = training_flops(self._config, max(step.length, 1.0)) * step.tokens
        return flops / step.seconds / self._peak

    def write(self, line: Mapping[str, Any]) -> None:
        """A line that names its step."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])

    def close(self) -> None:
        """Nothing more will come."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def reopened(path: Path, step: int) -> TextIO:
    """A file of lines of JSON with those up to a step, opened to be gone on with."""
    kept = []
    if path.exists():
        for raw in path.read_bytes().split(b"\n"):
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue  # the kill came while it was written
            number = line.get("step") if isinstance(line, dict) else step + 1
            # What names no step, whoever wrote it, is of none that was lost.
            if not isinstance(number, int | float) or number <= step:
                kept.append(raw + b"\n")
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)
    return path.open("a", encoding="utf-8")


def check_log(options: LogOptions) -> None:
    """Raise ValueError where what is to show the run is not installed."""
    if options.tensorboard:
        _summary_writer()
    if options.wandb:
        _wandb_package()


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("log.tensorboard needs tensorboard: pip install tensorboard") from None
    return SummaryWriter


def _wandb_package() -> Any:
    try:
        return import_module("wandb")
    except ImportError:
        raise ValueError("log.wandb needs wandb: pip install wandb") from None


def _wandb(project: str, folder: Path, about: Mapping[str, Any]) -> Any:
    # Kept in the folder: a name may be that of other runs, which a run would be added to.
    kept = folder / WANDB
    if not kept.exists():
        with atomic_file(kept) as path:
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return _wandb_package().init(
        project=project,
        name=folder.resolve().name,
        id=kept.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(folder),
        config=dict(about),
    )
