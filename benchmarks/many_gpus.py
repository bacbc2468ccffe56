"""Training over the GPUs of a host, by torchrun: one table for any number of them.

    python -m torch.distributed.run --nproc_per_node 8 -m benchmarks.many_gpus [SECTION ...]

Sections: slice (seven blocks), full, balanced (the same where every expert gets as many tokens),
lora, plans (the experts over all GPUs, a half, a quarter), document (one of 1 048 576 tokens) and
checkpoint. Weights and tokens are drawn; the routing is that of the drawn weights. A time is the
median of whole steps, of the slowest GPU: passes, norm, clipping, update. `--results FILE` keeps
what was measured, and shows each rate beside those of fewer GPUs that are in it; `--folder` keeps
the checkpoint, which a run on another number of GPUs then reads. `--tiny` is for a CPU, over gloo.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from benchmarks.measure import machine
from benchmarks.spread import World, build, copies, step, timed_calls, total_seconds
from benchmarks.table import Row, render
from nemotron_v3 import NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.parallel import Plan, halo, state_exchange
from nemotron_v3.parallel.costs import plan_costs
from nemotron_v3.train.optimizers import make_optimizer
from nemotron_v3.train.options import LoraOptions, OptimizerOptions

NANO = "nemotron-3-nano-30b"
SEVEN = range(7)  # MEMEM*E
GROUPS = ("attention", "mamba", "shared", "routed")
BYTES_8BIT = 2.06  # of two moments of a parameter, with a scale for 64
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "intermediate_size": 64,
}


@dataclass(frozen=True)
class Sizes:
    """What is measured: tokens of a row, rows of a pass, passes of a step, and how often."""

    row: int = 4096
    rows: int = 4
    passes: int = 16
    document: int = 2**20
    warm: int = 1
    repeats: int = 2
    tiny: bool = False

    def config(self, layers: Sequence[int] = ()) -> NemotronV3Config:
        config = NemotronV3Config.preset(NANO, **(TINY if self.tiny else {}))
        chosen = layers or (range(8) if self.tiny else ())
        return config.of_layers(chosen) if chosen else config


SMALL = Sizes(row=16, rows=2, passes=2, document=256, warm=0, repeats=1, tiny=True)


@dataclass
class Bench:
    """A world and what was measured in it before."""

    world: World
    sizes: Sizes
    folder: Path
    before: dict[str, dict[str, float]] = field(default_factory=dict)

    def rate(
        self, work: str, tokens: int, seconds: float, published: float = 0.0, must: float = 0.0
    ) -> Row:
        """Tokens a second of a GPU, beside what is asked for and what fewer GPUs did."""
        rate = tokens / seconds
        fewer = self.before.setdefault(work, {})
        peers = {"published": published, "asked": must}
        peers |= {f"on {n}": fewer[n] for n in sorted(fewer, key=int) if int(n) < self.world.size}
        fewer[str(self.world.size)] = rate
        peers = {name: value for name, value in peers.items() if value}
        return Row(work, self.shape, "tokens/s/GPU", rate, peers)

    def memory(self, work: str, planned: float) -> Row:
        """GiB that are reserved, beside those that the plan counts without activations."""
        peers = {"planned": planned} if planned else {}
        return Row(work, self.shape, "GiB", self.world.reserved(), peers, more_is_better=False)

    @property
    def shape(self) -> str:
        return f"{self.world.size} x {self.sizes.rows}x{self.sizes.row}"

    def batches(self, seed: int, documents: int = 1) -> list[dict[str, Any]]:
        """Passes of a step; a row is cut into so many documents of one length."""
        found = []
        for number in range(self.sizes.passes):
            generator = torch.Generator().manual_seed(self.world.rank + 97 * (seed + number))
            count = self.sizes.rows * self.sizes.row
            ids = torch.randint(0, self.sizes.config().vocab_size, (count,), generator=generator)
            each = self.sizes.row // documents
            bounds = torch.arange(0, count + 1, each, dtype=torch.int32)
            ids = ids.to(self.world.device)
            found.append({"input_ids": ids, "labels": ids, "cu_seqlens": bounds})
        return found

    def targets(self, documents: int = 1) -> int:
        """Of all processes in a step."""
        pieces = self.sizes.rows * documents
        each = self.sizes.rows * self.sizes.row - pieces
        return self.world.size * self.sizes.passes * each


def _trained(
    bench: Bench, model: NemotronV3ForCausalLM, optimizer: torch.optim.Optimizer, documents: int = 1
) -> float:
    """Seconds of a step; raises where a loss is none."""
    targets, losses = bench.targets(documents), []

    def run() -> None:
        batches = bench.batches(len(losses), documents)
        losses.append(step(model, optimizer, batches, targets))

    bench.world.forget()
    seconds = bench.world.seconds(run, bench.sizes.warm, bench.sizes.repeats)
    if not all(torch.isfinite(loss) for loss in losses):
        raise ValueError(f"losses of this process: {[float(loss) for loss in losses]}")
    return seconds


def _whole(bench: Bench, plan: Plan, **backend: Any) -> tuple[NemotronV3ForCausalLM, Any]:
    model = build(bench.world, bench.sizes.config(), plan, **backend)
    model.gradient_checkpointing_enable()
    options = OptimizerOptions(learning_rate=1e-6, moments="8bit", bf16_weights="stochastic")
    return model, make_optimizer(model, options, 0)


def _planned(bench: Bench, plan: Plan, config: NemotronV3Config) -> float:
    """GiB of weights, gradients and moments of 8 bits, and of what is gathered."""
    if bench.world.size == 1:
        return 0.0
    tokens = bench.sizes.rows * bench.sizes.row
    settled = plan.over(bench.world.size)
    return plan_costs(config, settled, tokens=tokens, moments=BYTES_8BIT).states / 2**30


def _full(bench: Bench, work: str, must: float, **backend: Any) -> Iterator[Row]:
    plan = Plan(ep=bench.world.size)
    model, optimizer = _whole(bench, plan, **backend)
    tokens = bench.sizes.passes * bench.sizes.rows * bench.sizes.row
    yield bench.rate(work, tokens, _trained(bench, model, optimizer), 16_789, must)
    yield bench.memory(work, _planned(bench, plan, model.config))


def full(bench: Bench) -> Iterator[Row]:
    return _full(bench, "full fine-tuning", 20_000)


def balanced(bench: Bench) -> Iterator[Row]:
    return _full(bench, "full, balanced by force", 22_000, fake_balanced_gate=True)


def lora(bench: Bench) -> Iterator[Row]:
    from nemotron_v3.hf import lora as adapters

    def adapt(model: NemotronV3ForCausalLM) -> None:
        adapters.add(model, LoraOptions(rank=16, groups=GROUPS))

    model = build(bench.world, bench.sizes.config(), Plan(ep=bench.world.size), adapt)
    model.gradient_checkpointing_enable()
    optimizer = make_optimizer(model, OptimizerOptions(learning_rate=1e-4, weight_decay=0.0), 0)
    seconds = _trained(bench, model, optimizer, documents=4)
    tokens = bench.sizes.passes * bench.sizes.rows * bench.sizes.row
    yield bench.rate("LoRA, packed", tokens, seconds, 3878, 26_000)
    yield bench.memory("LoRA, packed", 0.0)


def document(bench: Bench) -> Iterator[Row]:
    """All GPUs share the tokens of one document, and the experts."""
    world, length = bench.world, bench.sizes.document
    model = build(world, bench.sizes.config(SEVEN), Plan(cp=world.size, ep=world.size))
    model.gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator)
    ids = ids.to(world.device)
    batch = [{"input_ids": ids, "labels": ids}]
    world.forget()
    modules, names = [state_exchange, halo], ("gathered", "summed")
    with timed_calls(world, modules, names) as spans:
        seconds = world.seconds(lambda: step(model, None, batch, length - 1), 1, 1)
        mixers = total_seconds(world, spans[len(spans) // 2 :])
    shape = f"{world.size} x {length / world.size:,.0f}"
    yield Row("one document", shape, "tokens/s in all", length / seconds)
    share = 100 * world.most(mixers) / seconds
    yield Row("mixers' communication", shape, "% of it", share, {"asked": 3.0}, False)
    yield Row("one document", shape, "GiB", world.reserved(), more_is_better=False)


def plans(bench: Bench) -> Iterator[Row]:
    """Experts over all GPUs, over a half of them and so on, each as often as the rest holds."""
    ep, one = bench.world.size, Sizes(**{**vars(bench.sizes), "passes": 1})
    single = Bench(bench.world, one, bench.folder)
    while ep >= 2:
        plan = Plan(ep=ep)
        work = f"EP{ep}" + (f" x FSDP{bench.world.size // ep}" if ep < bench.world.size else "")
        model, optimizer = _whole(single, plan)
        seconds = _trained(single, model, optimizer)
        yield single.rate(f"{work}, one pass a step", one.rows * one.row, seconds)
        yield single.memory(work, _planned(single, plan, model.config))
        batches, targets = single.batches(0), single.targets()

        def passes(
            model: NemotronV3ForCausalLM = model, batches: Any = batches, targets: int = targets
        ) -> None:
            step(model, None, batches, targets)

        real = bench.world.seconds(passes, 1, one.repeats)
        with copies():
            alone = bench.world.seconds(passes, 1, one.repeats)
        yield Row(f"{work}, exposed communication", single.shape, "%", 100 * (1 - alone / real))
        del model, optimizer, passes
        _free(bench.world)
        ep //= 2


def slice_(bench: Bench) -> Iterator[Row]:
    """Seven blocks, which one GPU holds too."""
    sizes = Sizes(**{**vars(bench.sizes), "passes": 1, "rows": max(1, bench.sizes.rows // 2)})
    single = Bench(bench.world, sizes, bench.folder, bench.before)
    model = build(bench.world, sizes.config(SEVEN), Plan(ep=bench.world.size))
    optimizer = make_optimizer(model, OptimizerOptions(learning_rate=1e-6), 0)
    seconds = _trained(single, model, optimizer)
    yield single.rate("MEMEM*E with AdamW", sizes.rows * sizes.row, seconds)
    yield single.memory("MEMEM*E with AdamW", 0.0)


def checkpoint(bench: Bench) -> Iterator[Row]:
    """The whole model written, and read again; what another number of GPUs has left is read."""
    model = build(bench.world, bench.sizes.config(), Plan(ep=bench.world.size))
    written = sorted(bench.folder.glob("by-*/.metadata"))
    for metadata in written:
        took = _seconds(bench.world, lambda at=metadata.parent: _load(model, at))
        yield Row(f"read, saved {metadata.parent.name}", bench.shape, "s", took, {}, False)
    folder = bench.folder / f"by-{bench.world.size}"
    took = _seconds(
        bench.world, lambda: dcp.save(get_model_state_dict(model), checkpoint_id=folder)
    )
    yield Row("written", bench.shape, "s", took, {}, False)
    loss = step(model, None, bench.batches(0)[:1], bench.targets())
    _load(model, folder)
    again = step(model, None, bench.batches(0)[:1], bench.targets())
    if not torch.equal(loss, again):
        raise ValueError(f"loss {float(loss)} before, {float(again)} after it was read")


def _load(model: NemotronV3ForCausalLM, folder: Path) -> None:
    state = get_model_state_dict(model)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state)


def _seconds(world: World, run: Callable[[], Any]) -> float:
    world.wait()
    start = time.perf_counter()
    run()
    world.synchronize()
    return world.most(time.perf_counter() - start)


def _free(world: World) -> None:
    gc.collect()
    world.forget()


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "slice": slice_,
    "full": full,
    "balanced": balanced,
    "lora": lora,
    "plans": plans,
    "document": document,
    "checkpoint": checkpoint,
}


def measured(bench: Bench, names: Sequence[str]) -> Iterator[Row]:
    """The rows of sections; one that one process cannot do ends all, for others wait in it."""
    for name in names:
        try:
            for row in SECTIONS[name](bench):
                if bench.world.rank == 0:
                    print(f"measured: {row.work}, {row.unit}: {row.ours}", file=sys.stderr)
                yield row
        except ValueError as error:  # of all processes alike, or of what was measured
            yield Row(name, bench.shape, "-", f"FAILED: {error}")
        _free(bench.world)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m torch.distributed.run --nproc_per_node N -m benchmarks.many_gpus",
        description="Training over the GPUs of a host, in one table.",
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; by default all")
    parser.add_argument("--results", type=Path, help="JSON of what was measured, added to")
    parser.add_argument("--folder", type=Path, default=Path("checkpoints-of-many-gpus"))
    parser.add_argument("--passes", type=int, help="of a step")
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that it works")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown sections {sorted(unknown)}: choose from {', '.join(SECTIONS)}")
    sizes = SMALL if options.tiny else Sizes()
    if options.passes:
        sizes = Sizes(**{**vars(sizes), "passes": options.passes})
    known = options.results is not None and options.results.exists()
    before = json.loads(options.results.read_text()) if known else {}
    bench = Bench(World.join(), sizes, options.folder, before)
    rows = list(measured(bench, options.sections or list(SECTIONS)))
    if bench.world.rank == 0:
        facts = {**machine(), "processes": str(bench.world.size)}
        print(render(rows, facts), flush=True)
        if options.results is not None:
            options.results.write_text(json.dumps(bench.before, indent=1) + "\n")
    dist.barrier(group=bench.world.host)


if __name__ == "__main__":
    status = 1
    try:
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Others that wait in a collective do not keep this process, nor gloo's threads.
    os._exit(status)
