"""A mixture-of-experts block on a GPU in bf16, beside transformers' and PyTorch's grouped products.

Letters: T tokens, D hidden size, E experts, K choices a token, F expert width, X width the experts
see. GPU times are replays of a captured CUDA graph with a cold L2 cache, medians of many; the
peer's are CUDA events around calls, for it waits for the host. The floor is the products' work at
the rate of a large square product in the same run. Answers are checked first: against the portable
form, and against the peer on the same weights.
"""

import gc
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import gpu_time, peak_memory, wall_time
from benchmarks.rates import product_rate
from benchmarks.table import OOM, Row, unavailable
from benchmarks.turns import compares_peers
from nemotron_v3 import BackendConfig, MoEConfig, SequenceLayout, ops
from nemotron_v3.layers import NemotronV3MoE

BF16 = torch.bfloat16
CLOSE = 2e-2


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    latent: int | None = None

    @property
    def width(self) -> int:
        return self.latent or self.hidden

    def flops(self, T: int) -> float:
        """Of a forward; a backward has twice as many."""
        latent = 2 * self.hidden * self.latent if self.latent else 0
        routed = 2 * self.top_k * self.width * self.expert_width
        return 2.0 * T * (routed + 2 * self.hidden * self.shared_width + latent)


NANO = Shape("Nano", 2688, 128, 6, 1856, 3712)
SUPER = Shape("Super", 4096, 512, 22, 2688, 5376, 1024)


def rows() -> Iterator[Row]:
    """Every row of the table; raises first if a result is wrong."""
    for section in sections().values():
        yield from section()


def sections() -> dict[str, Callable[[], Iterator[Row]]]:
    """The rows in parts of which each can be measured without the others, once answers agree."""
    _check(_layer(NANO))
    _free()
    return {
        "Nano, block": partial(_blocks, NANO, (8192, 1024, 4096, 32768)),
        "Nano, routing": partial(_of_nano, _skewed),
        "Nano, updates": partial(_of_nano, _low_rank),
        "Nano, parts": partial(_of_nano, partial(_parts, NANO)),
        "Super, block": partial(_blocks, SUPER, (8192,)),
    }


def _blocks(shape: Shape, lengths: tuple[int, ...]) -> Iterator[Row]:
    layer, rate = _layer(shape), product_rate()
    peer, theirs = _peer(shape, layer)
    for T in lengths:
        yield from _block(shape, layer, T, rate, {theirs: peer})
        _free()


def _of_nano(rows: Callable[[NemotronV3MoE, int, float], Iterator[Row]]) -> Iterator[Row]:
    yield from rows(_layer(NANO), 8192, product_rate())
    _free()


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


# --- whole blocks ---------------------------------------------------------------------------------


def _layer(shape: Shape) -> NemotronV3MoE:
    config = MoEConfig(
        dim=shape.hidden,
        n_routed_experts=shape.experts,
        n_activated_experts=shape.top_k,
        moe_inter_dim=shape.expert_width,
        shared_expert_inter_dim=shape.shared_width,
        moe_latent_size=shape.latent,
        route_scale=2.5,
        dtype=BF16,
    )
    with torch.device("cuda"):
        return NemotronV3MoE(config, backend=BackendConfig(impl="triton"), dtype=BF16)


def _peer(shape: Shape, layer: NemotronV3MoE) -> tuple[nn.Module | None, str]:
    """transformers' block with the same weights, and its name; None where it is not installed."""
    if not compares_peers():
        return None, "transformers"
    try:
        from benchmarks.peers import transformers_peer as peer
    except ImportError:
        return None, "transformers"
    latent = {"moe_latent_size": shape.latent} if shape.latent else {}
    with torch.device("cuda"):
        block = peer.moe_block(
            hidden_size=shape.hidden,
            n_routed_experts=shape.experts,
            num_experts_per_tok=shape.top_k,
            moe_intermediate_size=shape.expert_width,
            moe_shared_expert_intermediate_size=shape.shared_width,
            routed_scaling_factor=2.5,
            **latent,
        )
    block.load_state_dict(layer.state_dict())
    x = _normal(1, 512, shape.hidden)
    with torch.no_grad():
        _compare("transformers", layer(x), block(x))
    return block, peer.NAME


def _call(block: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A call of the block; ours is given its layout, as the model gives it."""
    if not isinstance(block, NemotronV3MoE):
        return lambda: block(x)
    layout = SequenceLayout.plain(1, x.shape[1], "cuda")
    return lambda: block(x, layout=layout)


def _step(block: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    leaves, call = [x, *(p for p in block.parameters() if p.requires_grad)], _call(block, x)
    return lambda: torch.autograd.grad(call(), leaves, dy, allow_unused=True)


def _block(
    shape: Shape, layer: nn.Module, T: int, rate: float, peers: dict[str, nn.Module | None]
) -> Iterator[Row]:
    x, dy = _normal(1, T, shape.hidden).requires_grad_(), _normal(1, T, shape.hidden)
    floor, name = shape.flops(T) / rate, f"{shape.name}, {T}"
    options = {"more_is_better": False}

    def forward(block: nn.Module) -> Callable[[], Any]:
        return torch.no_grad()(_call(block, x))

    def of_peers(measure: Callable[[nn.Module], float]) -> dict[str, float | str]:
        return {k: _guarded(measure, block) for k, block in peers.items()}

    theirs = of_peers(lambda block: _event_time(forward(block)))
    ours = gpu_time(forward(layer))
    yield Row("block, forward", name, "us", ours, theirs, floor=floor, **options)
    step = _step(layer, x, dy)
    yield Row("block, forward, eager", name, "us", wall_time(forward(layer)), **options)
    theirs = of_peers(lambda block: _event_time(_step(block, x, dy)))
    ours = gpu_time(step)
    yield Row("block, forward + backward", name, "us", ours, theirs, floor=3 * floor, **options)
    _free()
    yield Row("block, forward + backward, eager", name, "us", wall_time(step), **options)
    of_weights = sum(p.numel() * p.element_size() for p in layer.parameters()) / 2**20
    theirs = of_peers(lambda block: peak_memory(_step(block, x, dy)) - of_weights)
    ours = peak_memory(step) - of_weights
    yield Row("block, peak beyond weight gradients", name, "MiB", ours, theirs, **options)


def _guarded(measure: Callable[[nn.Module], float], block: nn.Module | None) -> float | str:
    if block is None:
        return unavailable("not installed")
    try:
        return measure(block)
    except torch.OutOfMemoryError:
        return OOM


def _event_time(run: Callable[[], Any], repeats: int = 8) -> float:
    """Microseconds between CUDA events before and after a call: the median."""
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times[2:])


# --- parts of it ----------------------------------------------------------------------------------


def _parts(shape: Shape, layer: NemotronV3MoE, T: int, rate: float) -> Iterator[Row]:
    """Router, shared expert and experts, then the six products, beside `F.grouped_mm`."""
    x, dy = _normal(T, shape.hidden), _normal(T, shape.hidden)
    name = f"{shape.name}, {T}"
    options = {"more_is_better": False}
    with torch.no_grad():
        weights, indices = layer.gate(x)
        work = {
            "router, forward": lambda: layer.gate(x),
            "shared expert, forward": lambda: layer.shared_experts(x),
            "experts, forward": lambda: layer.experts(x, indices, weights),
        }
        floors = {"shared expert, forward": 4 * T * shape.hidden * shape.shared_width / rate}
        floors["experts, forward"] = shape.flops(T) / rate - floors["shared expert, forward"]
        for what, run in work.items():
            yield Row(what, name, "us", gpu_time(run), floor=floors.get(what), **options)
    yield from _products(shape, layer, x, dy, indices, weights, rate)


def _products(
    shape: Shape,
    layer: NemotronV3MoE,
    x: Tensor,
    dy: Tensor,
    indices: Tensor,
    weights: Tensor,
    rate: float,
) -> Iterator[Row]:
    """Ours read rows where their tokens lie and do what follows; the peer is given sorted rows."""
    from nemotron_v3.ops.experts.kernels import launch, products
    from nemotron_v3.ops.experts.kernels.tables import Plan

    T, K, E = x.shape[0], shape.top_k, shape.experts
    up, down = layer.experts.up_proj.detach(), layer.experts.down_proj.detach()
    plan, R = Plan.of(BF16), T * K
    where = launch.sorted_rows(x, R, E, plan.tile)
    launch.sort_rows(indices, weights, plan.tile, where)
    token = torch.where(where.source < 0, -1 - where.source, where.source).long()
    ends = where.offsets[1:].contiguous()
    hidden, du, wide = (
        _normal(R, n) for n in (shape.expert_width, shape.expert_width, shape.width)
    )
    partial = torch.empty(16, R, device="cuda")
    gradients = torch.empty_like(up), torch.empty_like(down)
    xs, dys = x[token], dy[token]
    back = {"epilogue": products.DOWN_BACKWARD.value, "hidden": hidden.abs(), "partial": partial}

    def rows(*args: Any, **kwargs: Any) -> Callable[[], None]:
        return lambda: launch.rows_product(*args, **kwargs)

    first = {"transposed": False, "gather": True, "epilogue": products.UP.value}
    plain = {"gather": False}
    work = {
        "up": (
            rows(plan.up, where, x, up, hidden, **first),
            lambda: F.grouped_mm(xs, up.transpose(1, 2), offs=ends),
        ),
        "down": (
            rows(plan.down, where, hidden, down, wide, transposed=False, **plain),
            lambda: F.grouped_mm(hidden, down.transpose(1, 2), offs=ends),
        ),
        "down backward": (
            rows(plan.down_backward, where, dy, down, du, transposed=True, gather=True, **back),
            lambda: F.grouped_mm(dys, down, offs=ends),
        ),
        "up backward": (
            rows(plan.up_backward, where, du, up, wide, transposed=True, **plain),
            lambda: F.grouped_mm(du, up, offs=ends),
        ),
        "gradient of up": (
            lambda: launch.weights_product(plan.weights, where, du, x, gradients[0], gather_b=True),
            lambda: F.grouped_mm(du.t(), xs, offs=ends),
        ),
        "gradient of down": (
            lambda: launch.weights_product(
                plan.weights, where, dy, hidden, gradients[1], gather_a=True, live=True
            ),
            lambda: F.grouped_mm(dys.t(), hidden, offs=ends),
        ),
    }
    floor = 2.0 * R * shape.width * shape.expert_width / rate
    name, options = f"{shape.name}, {T}", {"more_is_better": False}
    for what, (ours, theirs) in work.items():
        peers = {"F.grouped_mm": _event_time(theirs)}
        yield Row(f"experts, {what}", name, "us", gpu_time(ours), peers, floor=floor, **options)
    y = torch.empty_like(x)
    for what, run in {
        "experts, sort": lambda: launch.sort_rows(indices, weights, plan.tile, where),
        "experts, joining": lambda: launch.combine_rows(where, wide, weights, y, live=True),
    }.items():
        yield Row(what, name, "us", gpu_time(run), **options)


def _skewed(layer: NemotronV3MoE, T: int, rate: float) -> Iterator[Row]:
    """Expert i chosen with a weight of 1 / (i + 1) (Zipf), without repeats, forward + backward."""
    x, dy = _normal(T, NANO.hidden).requires_grad_(), _normal(T, NANO.hidden)
    weights = torch.rand(T, NANO.top_k, device="cuda").requires_grad_()
    rank = torch.arange(NANO.experts, device="cuda")
    noise = -torch.log(-torch.log(torch.rand(T, NANO.experts, device="cuda")))
    skewed = (noise - torch.log(rank + 1.0)).topk(NANO.top_k, dim=1).indices
    leaves = [x, weights, *layer.experts.parameters()]
    floor = 3 * 4.0 * T * NANO.top_k * NANO.width * NANO.expert_width / rate
    for what, indices in {"even": noise.topk(NANO.top_k, dim=1).indices, "Zipf": skewed}.items():

        def step(indices: Tensor = indices) -> Any:
            return torch.autograd.grad(layer.experts(x, indices, weights), leaves, dy)

        time, theirs = gpu_time(step), _gated(x, indices, weights.detach(), dy)
        name, options = f"Nano, {T}", {"floor": floor, "more_is_better": False}
        yield Row(f"experts, forward + backward, {what}", name, "us", time, theirs, **options)


def _gated(x: Tensor, indices: Tensor, weights: Tensor, dy: Tensor) -> dict[str, float | str]:
    """Gated experts of another project with as much work: two thirds as wide, in 16s."""
    if not compares_peers():
        return {}
    try:
        from benchmarks.peers import liger_peer as peer
    except ImportError:
        return {"liger-kernel": unavailable("not installed")}
    E, X, width = NANO.experts, NANO.width, NANO.expert_width * 2 // 48 * 16
    stacks = [_normal(E, 2 * width, X).mul_(X**-0.5), _normal(E, X, width).mul_(width**-0.5)]
    leaves = [t.detach().requires_grad_() for t in (x, weights, *stacks)]
    _check_gated(peer.gated_experts, indices, *leaves)

    def step() -> Any:
        y = peer.gated_experts(leaves[0], indices, *leaves[1:])
        return torch.autograd.grad(y, leaves, dy)

    return {f"{peer.NAME}, gated, as much work": _event_time(step)}


@torch.no_grad()
def _check_gated(run: Callable[..., Tensor], indices: Tensor, *leaves: Tensor) -> None:
    """The peer's first tokens against its equation."""
    x, weights, gate_up, down = (t[:64] if t.ndim == 2 else t for t in leaves)
    expected = torch.zeros_like(x, dtype=torch.float32)
    for token, chosen in enumerate(indices[:64].tolist()):
        for k, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[token]).float().chunk(2)
            h = (F.silu(gate) * up * weights[token, k]).to(BF16)
            expected[token] += (down[expert] @ h).float()
    _compare("gated experts", run(leaves[0], indices, *leaves[1:])[:64], expected)


def _low_rank(layer: NemotronV3MoE, T: int, rate: float, rank: int = 16) -> Iterator[Row]:
    """Frozen experts with low-rank updates, beside PyTorch's grouped products, and beside the same
    kernels on stacks to which the updates are added at every step."""
    x, dy = _normal(T, NANO.hidden).requires_grad_(), _normal(T, NANO.hidden)
    weights, indices = (t.detach() for t in layer.gate(x))
    weights.requires_grad_()
    up, down = (p.detach() for p in (layer.experts.up_proj, layer.experts.down_proj))
    E, F_, X = up.shape
    shapes = ((E, rank, X), (E, F_, rank), (E, rank, F_), (E, X, rank))
    updates = [(_normal(*s) * s[2] ** -0.5).requires_grad_() for s in shapes]
    leaves = [x, weights, *updates]

    def beside(impl: str) -> Callable[[], Tensor]:
        return lambda: ops.grouped_low_rank(x, indices, weights, up, down, *updates, impl=impl)

    def summed() -> Tensor:
        up_a, up_b, down_a, down_b = updates
        stacks = (torch.baddbmm(up, up_b, up_a), torch.baddbmm(down, down_b, down_a))
        return ops.experts(x, indices, weights, *stacks, impl="triton")

    def step(run: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(run(), leaves, dy)

    found = [step(beside(impl))() for impl in ("triton", "portable")]
    for ours, theirs in zip(*found, strict=True):
        _compare("low-rank updates", ours, theirs)
    del found
    grouped, added = "F.grouped_mm", "updates added to the stacks"
    name, options = f"Nano, {T}, rank {rank}", {"more_is_better": False}
    large, thin = (4.0 * T * NANO.top_k * n for n in (X * F_, rank * (X + F_)))
    for what, flops, run in (
        ("forward", large + thin, torch.no_grad()),
        ("forward + backward", 2 * large + 3 * thin, step),  # frozen stacks have no gradient
    ):
        floor = flops / rate
        ours = gpu_time(run(beside("triton")))
        theirs = {}
        if compares_peers():
            theirs = {
                grouped: _event_time(run(beside("portable"))),
                added: _event_time(run(summed)),
            }
        yield Row(f"experts with updates, {what}", name, "us", ours, theirs, floor=floor, **options)
        _free()
    memory = {grouped: beside("portable"), added: summed}
    theirs = {k: peak_memory(step(run)) for k, run in memory.items()}
    ours = peak_memory(step(beside("triton")))
    yield Row("experts with updates, peak", name, "MiB", ours, theirs, **options)


# --- checks ---------------------------------------------------------------------------------------


def _compare(what: str, ours: Tensor, theirs: Tensor) -> None:
    error = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    if not error < CLOSE:
        raise AssertionError(f"{what}: a result of shape {tuple(ours.shape)} is off by {error:.1e}")


def _check(layer: NemotronV3MoE) -> None:
    """Ours against the portable form, outputs and gradients; raises where they differ."""
    T = 1024
    x, dy = _normal(T, NANO.hidden).requires_grad_(), _normal(T, NANO.hidden)
    weights, indices = (t.detach() for t in layer.gate(x))
    weights.requires_grad_()
    matrices = (layer.experts.up_proj, layer.experts.down_proj)
    found = []
    for impl in ("triton", "portable"):
        y = ops.experts(x, indices, weights, *matrices, impl=impl)
        found.append([y, *torch.autograd.grad(y, [x, weights, *matrices], dy)])
    for ours, theirs in zip(*found, strict=True):
        _compare("experts", ours, theirs)
    expected, chosen = ops.router(
        x,
        layer.gate.weight,
        layer.gate.e_score_correction_bias,
        top_k=NANO.top_k,
        scaling_factor=2.5,
        impl="portable",
    )
    _compare("router", weights.sort(1).values, expected.sort(1).values)
    same = float((indices.sort(1).values == chosen.sort(1).values).float().mean())
    if same < 0.999:
        raise AssertionError(f"router: {1 - same:.1%} of the choices differ")
