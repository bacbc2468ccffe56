"""What a run would take: parameters, steps, FLOPs, time, and memory by part."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.model.cost import block_flops, forward_flops, parameters
from nemotron_v3.train.build import read_model_config
from nemotron_v3.train.display import clock
from nemotron_v3.train.ends import settle_ends
from nemotron_v3.train.memory import (
    Memory,
    device_room,
    estimate,
    lora_parameters,
    recomputed_blocks,
    usable,
)
from nemotron_v3.train.metrics import peak_flops
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.processes import make_device, rank_and_size
from nemotron_v3.train.run import length_of
from nemotron_v3.train.tokenizer import read_tokenizer, with_template


@dataclass(frozen=True)
class Plan:
    """A run on `processes` devices.

    `flops` are those of the model and of recomputed blocks, `seconds` at the given part of the
    peak; None where the peak is not known. `room` is a device's memory in bytes.
    """

    total: int
    trainable: int
    active: int
    steps: int | None
    tokens_per_step: int
    flops_per_step: float
    seconds: float | None
    memory: Memory
    room: int
    recomputed: int
    advice: tuple[str, ...]
    warnings: tuple[str, ...]


def make_plan(options: TrainOptions, mfu: float, room: int | None = None) -> Plan:
    """The plan of a run, whose data is read only where the number of steps depends on it.

    Args:
        options: of the run.
        mfu: the part of the devices' peak that is reached, 0 to 1.
        room: a device's bytes of memory; None is that of the device at hand.

    Raises:
        ValueError: options that cannot be.
    """
    options.check()
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu is {mfu}: give a part of the peak, 0 to 1")
    device = make_device(options.model.device)
    config = read_model_config(options.model, device)
    dtype = getattr(torch, options.model.dtype) if options.model.dtype else config.dtype
    if dtype is None:
        raise ValueError(f"the config of {options.model.path} tells no dtype: give model.dtype")
    count, (_, size) = parameters(config), rank_and_size()
    lora = lora_parameters(config, options.lora) if options.lora.rank else 0
    tokens = options.data.rows * options.data.tokens_per_row
    kernels, room = device.type == "cuda", room or device_room(device)
    again = recomputed_blocks(options, config, dtype, size, kernels, room)
    flops = tokens * _flops(options, config, again)
    steps = _steps(options)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    peak = peak_flops(name, options.log.peak_tflops)
    seconds = None
    if options.schedule.minutes is not None:
        seconds = 60 * options.schedule.minutes
    elif peak is not None and steps is not None:
        seconds = steps * flops / (peak * mfu * size)
    return Plan(
        total=count.total + lora,
        trainable=lora or count.total - _balanced(config),
        active=count.active,
        steps=steps,
        tokens_per_step=tokens,
        flops_per_step=flops,
        seconds=seconds,
        memory=estimate(options, config, dtype, size, kernels, room),
        room=room,
        recomputed=len(again),
        advice=tuple(_advice(options, config, dtype, size, kernels, room)),
        warnings=_warnings(options, config),
    )


def _balanced(config: NemotronV3Config) -> int:
    """Numbers of the routers' biases, which no gradient moves."""
    blocks = enumerate(config.layers_block_type)
    return sum(config.of_block(n).n_routed_experts for n, kind in blocks if kind == "moe")


def show_plan(options: TrainOptions, mfu: float, console: Console | None = None) -> None:
    """Print the plan of a run."""
    plan = make_plan(options, mfu)
    console = console or Console(highlight=False)
    table = Table(title="plan", title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", overflow="fold")
    for section in _sections(plan, mfu):
        for row in section:
            table.add_row(*row)
        table.add_section()
    console.print(table)
    for line in (*plan.advice, *(f"warning: {each}" for each in plan.warnings)):
        console.print(line, markup=False)


def _warnings(options: TrainOptions, config: NemotronV3Config) -> tuple[str, ...]:
    """What a run says of its tokenizer and its chats. A tokenizer that is still to be made has the
    special tokens of any other of that kind."""
    if options.model.tokenizer is None and options.model.path is None:
        tokenizer = Tokenizer.train(["a"], 258)
    else:
        tokenizer = read_tokenizer(options)
    return settle_ends(with_template(options), config, tokenizer).warnings


def _sections(plan: Plan, mfu: float) -> list[list[tuple[str, str]]]:
    seconds = "the device's peak is not known: give --log.peak-tflops"
    if plan.seconds is not None:
        seconds = f"{clock(plan.seconds)} at {mfu:.0%} of the peak"
    steps = "as many as the time allows" if plan.steps is None else f"{plan.steps:,}"
    tokens = "" if plan.steps is None else f"{plan.steps * plan.tokens_per_step:,}"
    parts = [(f"memory: {n}", _size(size)) for n, size in vars(plan.memory).items()]
    return [
        [
            ("parameters", f"{plan.total:,}"),
            ("trained", f"{plan.trainable:,}"),
            ("active a token", f"{plan.active:,}"),
        ],
        [
            ("steps", steps),
            ("tokens a step", f"{plan.tokens_per_step:,}"),
            ("tokens", tokens),
            ("FLOP a step", f"{plan.flops_per_step:.3g}"),
            ("time", seconds),
        ],
        [*parts, ("memory: all", f"{_size(plan.memory.total)} of {_size(plan.room)}")],
        [("blocks recomputed", f"{plan.recomputed:,}")],
    ]


def _size(size: float) -> str:
    return f"{size / 2**30:,.2f} GiB" if size >= 2**27 else f"{size / 2**20:,.1f} MiB"


def _flops(options: TrainOptions, config: NemotronV3Config, recomputed: Collection[int]) -> float:
    """FLOPs a token of a step, those of recomputed blocks included."""
    length = options.data.tokens_per_row
    # A frozen weight needs no gradient of its own.
    passes = 2 if options.lora.rank else 3
    kinds = config.layers_block_type
    again = sum(block_flops(config.of_block(n), kinds[n], length) for n in recomputed)
    return passes * forward_flops(config, length) + again


def _steps(options: TrainOptions) -> int | None:
    schedule = options.schedule
    if schedule.minutes is not None:
        return None
    if schedule.steps is not None or schedule.tokens is not None:
        return length_of(options, None).steps
    from nemotron_v3.data.packed import PackedData

    tokenizer = read_tokenizer(options)
    with PackedData(with_template(options).data, tokenizer) as data:
        return length_of(options, data).steps


def _advice(
    options: TrainOptions,
    config: NemotronV3Config,
    dtype: torch.dtype,
    size: int,
    kernels: bool,
    room: int,
) -> list[str]:
    """The changes that make it fit, the mildest first, each on top of those before it."""
    limit = usable(options.memory, room)
    needed = estimate(options, config, dtype, size, kernels, room).total
    if not limit or needed <= limit:
        return []
    told = [f"It does not fit: {_size(needed)} are needed. What to change:"]
    memory, optimizer, lora = options.memory, options.optimizer, options.lora
    every = "auto" if memory.checkpoint_every == "auto" else 1
    changes = [
        ("memory.rows_per_pass = 1", {"memory": replace(memory, rows_per_pass=1)}),
        (
            "memory.checkpoint_every = 1",
            {"memory": replace(memory, rows_per_pass=1, checkpoint_every=every)},
        ),
        (
            'optimizer.bf16_weights = "stochastic"',
            {"optimizer": replace(optimizer, bf16_weights="stochastic")},
        ),
        (
            'optimizer.moments = "8bit"',
            {"optimizer": replace(optimizer, bf16_weights="stochastic", moments="8bit")},
        ),
        ("lora.rank = 16", {"lora": replace(lora, rank=lora.rank or 16)}),
    ]
    for name, change in changes:
        changed = replace(options, **change)
        if changed == options:
            continue
        options = changed
        needed = estimate(options, config, dtype, size, kernels, room).total
        told.append(f"  {name}: {_size(needed)}")
        if needed <= limit:
            return told
    return [*told, "  more processes (torchrun), shorter rows, or a smaller model"]
