"""What is needed to measure a model that several processes share: drawn weights, whole steps, time,
memory, and the same step with every collective replaced by a copy on the device.

Letters: R processes.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from benchmarks.table import unavailable
from nemotron_v3 import BackendConfig, NemotronV3Config, NemotronV3ForCausalLM
from nemotron_v3.parallel import Plan, clip_gradients_, collectives, gradient_norm, parallelize

GIB = 2**30


@dataclass(frozen=True)
class World:
    """This process among those that torchrun has started; `host` is all of them, through hosts."""

    rank: int
    size: int
    device: torch.device
    host: Any

    @classmethod
    def join(cls) -> "World":
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        backend, device = "gloo", torch.device("cpu")
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank)))
            torch.cuda.set_device(device)
        dist.init_process_group(backend, timeout=timedelta(minutes=5))
        return cls(rank, size, device, dist.new_group(backend="gloo"))

    def most(self, value: float) -> float:
        """The largest of all processes'."""
        found = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.host)
        return found.item()

    def seconds(self, run: Callable[[], Any], warm: int, repeats: int) -> float:
        """The median of the slowest process, the device's work included."""
        taken = []
        for number in range(warm + repeats):
            self.wait()
            start = time.perf_counter()
            run()
            self.synchronize()
            if number >= warm:
                taken.append(time.perf_counter() - start)
        return self.most(statistics.median(taken))

    def wait(self) -> None:
        self.synchronize()
        dist.barrier(group=self.host)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def reserved(self) -> float | str:
        """GiB that the fullest device has reserved at most since `forget`."""
        if self.device.type != "cuda":
            return unavailable("of a GPU")
        return self.most(torch.cuda.max_memory_reserved() / GIB)

    def forget(self) -> None:
        """Give back what nobody holds, and begin to look at memory anew."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def build(
    world: World,
    config: NemotronV3Config,
    plan: Plan,
    adapt: Callable[[NemotronV3ForCausalLM], Any] | None = None,
    **backend: Any,
) -> NemotronV3ForCausalLM:
    """A model with drawn weights that the processes share; one process has it alone."""
    with torch.device("meta"):
        wide = config.replace(dtype=torch.bfloat16)
        model = NemotronV3ForCausalLM(wide, backend=BackendConfig(**backend))
    if adapt is not None:
        adapt(model)
    if world.size > 1:
        policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
        parallelize(model, plan, mp_policy=policy, device_type=world.device.type)
    model.to_empty(device=world.device)
    draw(model, world.rank)
    return model.train()


@torch.no_grad()
def draw(model: NemotronV3ForCausalLM, seed: int) -> None:
    """Weights of the usual sizes: each process its own parts, without a word to the others."""
    torch.manual_seed(seed)
    back = 0.02 / math.sqrt(len(model.model.layers))
    for name, parameter in model.named_parameters():
        own, leaf = local(parameter), name.rsplit(".", 1)[-1]
        if leaf == "A_log":
            own.copy_(torch.linspace(1, 16, own.numel(), device=own.device).log())
        elif leaf == "dt_bias":
            own.fill_(math.log(math.expm1(0.01)))
        elif "lora_B" in name or leaf.endswith("_b") or leaf == "bias":
            own.zero_()
        elif parameter.dim() == 1:
            own.fill_(1.0)
        elif any(part in name for part in ("out_proj", "o_proj", "down_proj")):
            own.normal_(0, back)
        else:
            own.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.zero_()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    batches: list[dict[str, Any]],
    targets: int,
) -> Tensor:
    """Passes, and with an optimiser their norm, clipping and an update; this process's loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total = torch.zeros((), device=trained[0].device)
    for number, batch in enumerate(batches, 1):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number == len(batches))
        loss = model(**batch, num_items_in_batch=targets).loss
        loss.backward()
        total += loss.detach()
    if optimizer is not None:
        clip_gradients_(trained, 1.0, gradient_norm(trained))
        optimizer.step()
    for parameter in trained:
        parameter.grad = None
    return total


class _Done:
    """A collective that has nothing to wait for."""

    def wait(self, *_: Any) -> bool:
        return True


def _ends(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Where a collective writes, and what it reads."""
    names = ("output", "output_tensor", "input", "input_tensor")
    out, x = (t for t in (*args, *map(kwargs.get, names)) if isinstance(t, Tensor))
    return out, x


def _gather(*args: Any, **kwargs: Any) -> _Done | None:
    out, x = _ends(args, kwargs)
    if x.numel():
        out.view(-1, x.numel()).copy_(x.reshape(1, -1).expand(out.numel() // x.numel(), -1))
    return _Done() if kwargs.get("async_op") else None


def _scatter(*args: Any, **kwargs: Any) -> _Done | None:
    out, x = _ends(args, kwargs)
    out.view(-1).copy_(x.reshape(-1)[: out.numel()])
    return _Done() if kwargs.get("async_op") else None


def _exchange(*args: Any, **kwargs: Any) -> _Done | None:
    out, x = _ends(args, kwargs)
    rows = min(len(out), len(x))
    out[:rows].copy_(x[:rows])
    out[rows:].zero_()
    return _Done() if kwargs.get("async_op") else None


COPIES = {
    "all_gather_into_tensor": _gather,
    "_all_gather_base": _gather,
    "all_gather_single": _gather,
    "reduce_scatter_tensor": _scatter,
    "_reduce_scatter_base": _scatter,
    "reduce_scatter_single": _scatter,
    "all_to_all_single": _exchange,
}


@contextmanager
def copies() -> Iterator[None]:
    """Collectives that copy what is here as often as it would come; the numbers are nonsense.

    What a step takes beyond this is communication that nothing hides.
    """
    replaced = {name: getattr(dist, name) for name in COPIES if hasattr(dist, name)}
    gather, collectives._all_gather = collectives._all_gather, _gather
    for name in replaced:
        setattr(dist, name, COPIES[name])
    try:
        yield
    finally:
        collectives._all_gather = gather
        for name, function in replaced.items():
            setattr(dist, name, function)


@contextmanager
def timed_calls(world: World, modules: list[Any], names: tuple[str, ...]) -> Iterator[list[Any]]:
    """The time of functions that modules call by name, as pairs of events or of seconds."""
    spans: list[Any] = []

    def now() -> Any:
        if world.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = now()
            found = function(*args, **kwargs)
            spans.append((start, now()))
            return found

        return call

    there = [(m, n, getattr(m, n)) for m in modules for n in names if hasattr(m, n)]
    for module, name, function in there:
        setattr(module, name, timed(function))
    try:
        yield spans
    finally:
        for module, name, function in there:
            setattr(module, name, function)


def total_seconds(world: World, spans: list[Any]) -> float:
    """Of `timed_calls`, the device's."""
    world.synchronize()
    if world.device.type == "cpu":
        return sum(end - start for start, end in spans)
    return sum(start.elapsed_time(end) for start, end in spans) / 1e3
