"""What a training run is asked to do: one typed configuration, spelt by a TOML file.

Nothing is imported here but the data's options, so that a command line knows its help at once.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemotron_v3.data.options import DataOptions, Source

DTYPE_KEYS = frozenset({"dtype", "torch_dtype"})
"""Of a model's config: the weights' dtype, which `model.dtype` says too."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model is trained."""

    path: Path | None = None
    """checkpoint to go on from; without one the model is fresh"""
    preset: str | None = None
    """sizes of a fresh model: the name of a released one, or a config.json"""
    config: dict[str, Any] = field(default_factory=dict)
    """fields of a fresh model's config, over those of the preset (in the file alone)"""
    tokenizer: Path | None = None
    """folder with a tokenizer.json; else the checkpoint's, or one trained on the data"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the weights; else the checkpoint's, and fp32 for a fresh model on a CPU"""
    device: str | None = None
    """else a GPU where there is one"""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters in place of training all weights."""

    rank: int = 0
    """0 trains the whole model"""
    alpha: float | None = None
    """the updates are scaled by alpha / rank; else 2 rank"""
    groups: tuple[str, ...] = ()
    """weights to adapt: attention, mamba, mlp, shared, latent, routed, head; else all of them but
    routed and head"""
    dropout: float = 0.0
    """of the input of the projections' adapters"""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How several processes share a sharded model."""

    ep: int = 1
    """processes that the experts of a layer are spread over: tokens travel, not weights"""
    dp_replicate: int = 1
    """sets of processes that hold the whole model each"""
    dispatcher: Literal["auto", "gather", "all_to_all"] = "auto"
    """how tokens come to experts: all to all processes of ep, or each to those that have some of
    its experts; auto takes what sends less"""
    cp: int = 1
    """processes that share the tokens of each row, for rows too long for one: a mixer's state
    travels, not the tokens"""
    cp_layout: Literal["auto", "contiguous", "zigzag"] = "auto"
    """one piece of the tokens to each of cp, or an early and a late one, which is even in
    attention; auto takes zigzag for long documents"""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """AdamW, or Muon for the matrices of hidden layers beside it."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon moves projections and experts by orthogonal matrices (Jordan et al. 2024); embeddings,
    head, routers and vectors stay with AdamW"""
    learning_rate: float = 1e-4
    """the highest, after the warm-up"""
    weight_decay: float = 0.1
    """of matrices; norms, biases, A_log, D and dt_bias have none"""
    betas: tuple[float, float] = (0.9, 0.95)
    """of AdamW's moments"""
    momentum: float = 0.95
    """of muon's matrices"""
    eps: float = 1e-8
    clip_norm: float = 1.0
    """longest gradient of all parameters together"""
    moments: Literal["float32", "8bit"] = "float32"
    """8bit has torchao's codes of 8 bits, a scale for each block of a row"""
    bf16_weights: Literal["stochastic", "master", "nearest"] = "stochastic"
    """how updated bf16 weights are rounded: at random, from an fp32 copy, or to the nearest"""
    balance: float = 0.0
    """how far the routers' biases move in a step towards experts with too few tokens, 1e-3 in the
    paper (arXiv 2408.15664); it falls with the learning rate, and 0 leaves them alone"""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How long, and the learning rate's course. Without a length it ends with the data."""

    steps: int | None = None
    tokens: int | None = None
    """in place of steps"""
    minutes: float | None = None
    """in place of steps: by the clock, so that no two runs are equal"""
    warmup: float = 0.05
    """part of the training over which the rate rises"""
    shape: Literal["cosine", "linear", "stable-decay", "constant"] = "cosine"
    decay: float = 0.2
    """part of the training over which stable-decay falls, at its end"""
    least: float = 0.01
    """the rate never falls below this part of the highest"""


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """What is traded for memory."""

    rows_per_pass: int = 1
    """rows of a step that pass the model as one batch; the rest of a process's rows follow"""
    passes_at_once: int = 1
    """so many batches of a step side by side, each on its share of a CPU's threads; in one process
    on a CPU alone. What is computed stays the same"""
    checkpoint_every: int | Literal["auto"] = 0
    """recompute every nth block in the backward pass: 0 keeps all activations, 1 recomputes all;
    auto recomputes as few as the device's memory allows"""
    device_gib: float | None = None
    """of a device's memory that may be filled; else 92 % of what it has"""
    compile: bool = False
    """torch.compile the blocks"""


@dataclass(frozen=True, kw_only=True)
class SaveOptions:
    """What can be gone on from."""

    every: int = 500
    """steps between saves; 0 saves at the end alone"""
    minutes: float | None = None
    """also save when so long has passed since the last save"""
    keep: int = 2
    """so many of the last ones stay"""
    keep_best: bool = True
    """the one with the least validation loss stays as well; with no-keep-best it goes
    when it is none of the last"""
    background: bool = True
    """write while the training goes on; with no-background it waits"""


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Text that is not trained on."""

    sources: tuple[Source, ...] = ()
    every: int = 500
    """steps between measurements; there is one at the end in any case"""
    rows: int = 64
    """at most so many rows, the same ones each time"""


@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is told, beside metrics.jsonl."""

    every: int = 1
    """steps between lines of metrics.jsonl; a terminal is told every ten seconds"""
    details: int = 10
    """steps between loads of experts, gradient norms by kind of block and memory; 0 for none"""
    report: float = 5.0
    """minutes between writings of report.html, the page of the run; 0 for no page"""
    samples: tuple[str, ...] = ()
    """prompts that the model continues whenever it is validated, and at the end: its likeliest
    tokens, which samples.jsonl and the page show"""
    sample_tokens: int = 64
    """tokens of each of them, at most"""
    tensorboard: bool = False
    wandb: str | None = None
    """project in Weights & Biases"""
    peak_tflops: float | None = None
    """of one device, for the model FLOPs utilisation; known for common GPUs"""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """A training run."""

    out: Path = Path("runs/train")
    """folder of the run"""
    data: DataOptions
    model: ModelOptions = field(default_factory=ModelOptions)
    lora: LoraOptions = field(default_factory=LoraOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    schedule: ScheduleOptions = field(default_factory=ScheduleOptions)
    memory: MemoryOptions = field(default_factory=MemoryOptions)
    save: SaveOptions = field(default_factory=SaveOptions)
    validation: ValidationOptions = field(default_factory=ValidationOptions)
    log: LogOptions = field(default_factory=LogOptions)
    parallel: Literal["fsdp", "ddp"] = "fsdp"
    """how several processes share the model: sharded, or a copy each"""
    plan: PlanOptions = field(default_factory=PlanOptions)
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError, naming every option that cannot be."""
        problems = [told for told, fine in _rules(self) if not fine]
        if problems:
            alone = len(problems) == 1
            raise ValueError(
                problems[0] if alone else "\n  - ".join(["the options cannot be:", *problems])
            )


def _has_room_for_bytes(model: ModelOptions) -> bool:
    """Whether a byte-level tokenizer may have the vocabulary that is asked for, if any is."""
    size = model.config.get("vocab_size")
    return not isinstance(size, int) or size > 257


def _rules(o: TrainOptions) -> list[tuple[str, bool]]:
    """What has to hold, each with what is said where it does not."""
    lengths = [n for n in ("steps", "tokens", "minutes") if getattr(o.schedule, n) is not None]
    fresh = o.model.path is None
    s, p = o.schedule, o.optimizer
    rules = [
        (
            f"schedule.{' and schedule.'.join(lengths)} are lengths of one training: give one",
            len(lengths) < 2,
        ),
        (
            "model.path names a checkpoint, whose sizes are settled: leave model.preset and "
            "model.config out",
            fresh or not (o.model.preset or o.model.config),
        ),
        (
            "there is no model: give model.path, model.preset or a table [model.config]",
            not fresh or bool(o.model.preset or o.model.config),
        ),
        (
            "model.dtype and a dtype in model.config say the same: give one of them",
            o.model.dtype is None or not DTYPE_KEYS & o.model.config.keys(),
        ),
        (
            f"model.config.vocab_size is {o.model.config.get('vocab_size')}: a tokenizer that is "
            "made of the data has at least 258 tokens; give so many, or model.tokenizer",
            not (fresh and o.model.tokenizer is None) or _has_room_for_bytes(o.model),
        ),
        (f"lora.rank is {o.lora.rank}: give 0 or more", o.lora.rank >= 0),
        (
            "lora.alpha, lora.groups and lora.dropout are of adapters, and lora.rank 0 trains the "
            "whole model: give a rank, or leave them out",
            o.lora.rank != 0 or o.lora == LoraOptions(),
        ),
        (
            f"schedule.decay is {s.decay}, which the shape {s.shape} has not: leave it out, or "
            'give schedule.shape = "stable-decay"',
            s.shape == "stable-decay" or s.decay == ScheduleOptions().decay,
        ),
        (
            f"seed is {o.seed}: give an integer of 64 bits",
            -(2**63) <= o.seed < 2**64,
        ),
        (
            'plan is of a model that is sharded: leave it out, or give parallel = "fsdp"',
            o.parallel == "fsdp" or o.plan == PlanOptions(),
        ),
        (f"lora.dropout is {o.lora.dropout}: give 0 to 1", 0 <= o.lora.dropout < 1),
        (
            "memory.passes_at_once is of plain passes: leave it at 1 with memory.compile, "
            "memory.checkpoint_every or lora.dropout",
            o.memory.passes_at_once == 1
            or not (o.memory.compile or o.memory.checkpoint_every or o.lora.dropout),
        ),
        (
            "optimizer.kind = 'muon' has one moment, in fp32: give optimizer.moments = 'float32'",
            p.kind == "adamw" or p.moments == "float32",
        ),
        (
            "optimizer.kind = 'muon' is for whole matrices, and lora trains factors of updates: "
            "give optimizer.kind = 'adamw'",
            p.kind == "adamw" or not o.lora.rank,
        ),
        (f"optimizer.momentum is {p.momentum}: give a part, 0 to 1", 0 <= p.momentum < 1),
        (
            f"optimizer.betas are {p.betas}: give two numbers from 0 to 1",
            all(0 <= beta < 1 for beta in p.betas),
        ),
    ]
    finite = math.isfinite
    positive = {
        "schedule.steps": s.steps,
        "schedule.tokens": s.tokens,
        "schedule.minutes": s.minutes,
        "optimizer.learning_rate": p.learning_rate,
        "optimizer.eps": p.eps,
        "optimizer.clip_norm": p.clip_norm,
        "schedule.decay": s.decay,
        "schedule.least": s.least,
        "memory.rows_per_pass": o.memory.rows_per_pass,
        "memory.passes_at_once": o.memory.passes_at_once,
        "save.minutes": o.save.minutes,
        "save.keep": o.save.keep,
        "validation.every": o.validation.every,
        "validation.rows": o.validation.rows,
        "log.every": o.log.every,
        "log.sample_tokens": o.log.sample_tokens,
        "log.peak_tflops": o.log.peak_tflops,
        "memory.device_gib": o.memory.device_gib,
        "lora.alpha": o.lora.alpha,
        "plan.ep": o.plan.ep,
        "plan.dp_replicate": o.plan.dp_replicate,
        "plan.cp": o.plan.cp,
    }
    rules += [
        (f"{name} is {value}: give a positive number", value is None or 0 < value < math.inf)
        for name, value in positive.items()
    ]
    not_negative = {
        "optimizer.weight_decay": p.weight_decay,
        "optimizer.balance": p.balance,
        "memory.checkpoint_every": 0
        if o.memory.checkpoint_every == "auto"
        else o.memory.checkpoint_every,
        "save.every": o.save.every,
        "log.details": o.log.details,
        "log.report": o.log.report,
    }
    rules += [
        (f"{name} is {value}: give 0 or more", finite(value) and value >= 0)
        for name, value in not_negative.items()
    ]
    parts = {"schedule.warmup": s.warmup, "schedule.decay": s.decay, "schedule.least": s.least}
    rules += [(f"{n} is {v}: give a part, 0 to 1", 0 <= v <= 1) for n, v in parts.items()]
    return rules
