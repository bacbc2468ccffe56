"""The core of a Mamba-2 mixer on a GPU, at the shapes of Nemotron-3 Nano in bf16.

Letters: T tokens, H heads, P head width, G groups, N state. GPU times are replays of a captured
CUDA graph with a cold L2 cache, medians of many; "eager" is the clock of the host around a call
that nothing overlaps. Floors are the fewest bytes at the rate of a large copy in the same run, and
the mixer's products at that of a large product. Answers are checked against the portable form
first.
"""

import gc
import random
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import gpu_time, peak_memory, wall_time
from benchmarks.lengths import documents
from benchmarks.rates import copy_rate, product_rate
from benchmarks.table import Row, unavailable
from benchmarks.turns import compares_peers
from nemotron_v3 import NemotronV3Config, ops
from nemotron_v3.layers import NemotronV3Mamba2Mixer
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.ops.mamba2 import cases

H, P, G, N, W = 64, 64, 8, 128, 4
INNER, CHANNELS = H * P, H * P + 2 * G * N
PEER = "mamba_ssm"


def rows() -> Iterator[Row]:
    """Every row of the table; the first raises if a result is wrong."""
    for section in sections().values():
        yield from section()


def sections() -> dict[str, Callable[[], Iterator[Row]]]:
    """The rows in parts of which each can be measured without the others, once answers agree."""
    _check()
    T = 8192
    return {
        "convolution": partial(_conv, T),
        "norm": partial(_norm, T),
        "scan": partial(_scan, T),
        "core": _cores,
        "core, new lengths": partial(_new_lengths, T),
        "mixer": partial(_mixer, T),
        "linear growth": _linear_growth,
    }


# --- rows -----------------------------------------------------------------------------------------


def _row(work: str, T: int | str, ours: float, floor: float | None = None, **peers: Any) -> Row:
    return Row(work, str(T), "us", ours, peers, more_is_better=False, floor=floor)


def _floor(T: int, columns: int) -> float:
    """Microseconds to move so many columns of bf16, each read or written once."""
    return 2 * T * columns / copy_rate()


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _conv(T: int) -> Iterator[Row]:
    layout = SequenceLayout.from_lengths([T], "cuda")
    x, dy = _normal(T, CHANNELS), _normal(T, CHANNELS)
    weight, bias = _normal(CHANNELS, W), _normal(CHANNELS)
    given = {"layout": layout, "impl": "triton"}
    yield _row(
        "conv + SiLU, forward",
        T,
        gpu_time(lambda: ops.causal_conv1d(x, weight, bias, **given)),
        _floor(T, 2 * CHANNELS),
    )
    from nemotron_v3.ops.causal_conv1d.kernels.launch import tables

    backward = torch.ops.nemotron_v3.causal_conv1d_backward
    place = tables(layout)
    yield _row(
        "conv + SiLU, backward",
        T,
        gpu_time(lambda: backward(dy, None, x, weight, bias, None, *place, True)),
        _floor(T, 3 * CHANNELS),
    )


def _norm(T: int) -> Iterator[Row]:
    y, z, dout, weight = _normal(T, INNER), _normal(T, INNER), _normal(T, INNER), _normal(INNER)
    size = INNER // G
    peer = _peer_module("layernorm_gated")
    theirs = unavailable("not installed")
    if peer is not None:
        theirs = gpu_time(
            lambda: peer.rmsnorm_fn(
                y, weight, None, z=z, eps=1e-5, group_size=size, norm_before_gate=False
            )
        )
    yield _row(
        "gated norm, forward",
        T,
        gpu_time(lambda: ops.gated_rms_norm(y, z, weight, size, impl="triton")),
        _floor(T, 3 * INNER),
        **{PEER: theirs},
    )
    backward = torch.ops.nemotron_v3.gated_rms_norm_backward
    yield _row(
        "gated norm, backward",
        T,
        gpu_time(lambda: backward(dout, y, z, weight, size, 1e-5, y.dtype)),
        _floor(T, 5 * INNER),
    )


def _scan(T: int) -> Iterator[Row]:
    layout = SequenceLayout.from_lengths([T], "cuda")
    x, B, C = (_normal(T, *shape).requires_grad_() for shape in ((H, P), (G, N), (G, N)))
    dt, D = _normal(T, H).requires_grad_(), torch.ones(H, device="cuda").requires_grad_()
    A = -torch.linspace(1, 16, H, device="cuda")
    A.requires_grad_()
    bias = torch.linspace(-6.9, -2.2, H, device="cuda").requires_grad_()
    dy = _normal(T, H, P)

    def scan() -> Tensor:
        return ops.ssd(x, dt, A, B, C, D=D, dt_bias=bias, layout=layout, impl="triton")[0]

    def both() -> None:
        torch.autograd.grad(scan(), (x, dt, A, B, C, D, bias), dy)

    with torch.no_grad():
        forward = gpu_time(scan)
    peer = _peer_module("ssd_combined")
    theirs = theirs_both = unavailable("not installed")
    if peer is not None:

        def peer_scan() -> Tensor:
            return peer.mamba_chunk_scan_combined(
                *(t[None] for t in (x, dt)),
                A,
                *(t[None] for t in (B, C)),
                chunk_size=128,
                D=D,
                dt_bias=bias,
                dt_softplus=True,
            )

        def peer_both() -> None:
            torch.autograd.grad(peer_scan(), (x, dt, A, B, C, D, bias), dy[None])

        with torch.no_grad():
            theirs = gpu_time(peer_scan)
        theirs_both = gpu_time(peer_both)
    # x, B, C, dt in and y out; back dy, x, B, C, dt in and dx, dB, dC, ddt out.
    floor, back = _floor(T, 2 * INNER + 2 * G * N + H), _floor(T, 3 * INNER + 4 * G * N + 2 * H)
    yield _row("scan, forward (states kept)", T, forward, floor, **{PEER: theirs})
    yield _row("scan, forward + backward", T, gpu_time(both), floor + back, **{PEER: theirs_both})


def _core_inputs(lengths: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any], Tensor]:
    case = cases.Case("nano", lengths, H, P, G, N)
    inputs = cases.make_inputs(case, torch.bfloat16, "cuda", torch.Generator().manual_seed(0))
    leaves = {k: None if t is None else t.requires_grad_() for k, t in inputs.tensors.items()}
    return leaves, inputs.options, _normal(sum(lengths), INNER)


def _cores() -> Iterator[Row]:
    for lengths in ((8192,), (128,) * 64, (4096,) * 4):
        yield from _core(lengths)


def _core(lengths: tuple[int, ...]) -> Iterator[Row]:
    leaves, options, dy = _core_inputs(lengths)
    given = [t for t in leaves.values() if t is not None]
    shape = f"{len(lengths)} x {lengths[0]}"

    def both() -> None:
        y = ops.mamba2(**leaves, **options, return_final_states=False, impl="triton")[0]
        torch.autograd.grad(y, given, dy)

    yield _row("core, forward + backward, graph", shape, gpu_time(both))
    yield _row("core, forward + backward, eager", shape, wall_time(both))
    peak = peak_memory(both)
    yield Row("core, peak memory", shape, "MiB", peak, more_is_better=False)


def _new_lengths(T: int) -> Iterator[Row]:
    """The core on packs whose documents have other lengths in every step, their tables included."""
    leaves, options, dy = _core_inputs((T,))
    given = [t for t in leaves.values() if t is not None]
    source, draw = random.Random(0), documents(T, 64)

    def both() -> None:
        options["layout"] = SequenceLayout.from_lengths(draw(source), "cuda")
        y = ops.mamba2(**leaves, **options, return_final_states=False, impl="triton")[0]
        torch.autograd.grad(y, given, dy)

    yield _row("core, forward + backward, eager", "64 documents, new lengths", wall_time(both))


def _mixer(T: int) -> Iterator[Row]:
    """The whole layer with its projections, eager and through `torch.compile`."""
    config = NemotronV3Config.preset("nemotron-3-nano-30b")
    with torch.device("cuda"):
        mixer = NemotronV3Mamba2Mixer(config, 0)
    x = _normal(1, T, config.hidden_size).requires_grad_()
    dy = _normal(1, T, config.hidden_size)
    given = [x, *mixer.parameters()]
    compiled = torch.compile(mixer, fullgraph=True)

    def both(layer: Any = mixer) -> None:
        torch.autograd.grad(layer(x), given, dy)

    products = 6.0 * T * sum(w.numel() for w in (mixer.in_proj.weight, mixer.out_proj.weight))
    core = _floor(T, 2 * (2 * INNER + CHANNELS + H) + 2 * INNER)
    floor = products / product_rate() + core
    yield _row("mixer, forward + backward, graph", T, gpu_time(both), floor)
    yield _row("mixer, forward + backward, eager", T, wall_time(both))
    yield _row("mixer, forward + backward, compiled", T, wall_time(lambda: both(compiled)))


def _linear_growth() -> Iterator[Row]:
    """Nanoseconds a token: the forward to 1 M tokens, with the backward to 256 k."""
    width = INNER + CHANNELS + H
    leaves, options, _ = _core_inputs((1,))
    for T, train in ((2**14, True), (2**18, True), (2**20, False)):
        leaves["zxbcdt"] = _normal(T, width).requires_grad_()
        options["layout"] = SequenceLayout.from_lengths([T], "cuda")
        given = [t for t in leaves.values() if t is not None]

        def forward(options: dict = options) -> Tensor:
            return ops.mamba2(**leaves, **options, impl="triton")[0]

        with torch.no_grad():
            value = gpu_time(forward, 5) * 1e3 / T
        yield Row("core, forward, a token", f"1 x {T}", "ns", value, more_is_better=False)
        if train:
            dy = _normal(T, INNER)
            value = gpu_time(lambda: torch.autograd.grad(forward(), given, dy), 5) * 1e3 / T  # noqa: B023
            yield Row(
                "core, forward + backward, a token", f"1 x {T}", "ns", value, more_is_better=False
            )
            del dy
        gc.collect()
        torch.cuda.empty_cache()


# --- checks and the peer --------------------------------------------------------------------------


def _check() -> None:
    """Ours against the portable form on what is measured; raises where they differ."""
    leaves, options, dy = _core_inputs((512,))
    given = [t for t in leaves.values() if t is not None]
    found = []
    for impl in ("triton", "portable"):
        y = ops.mamba2(**leaves, **options, impl=impl)[0]
        found.append([y, *torch.autograd.grad(y, given, dy)])
    for ours, theirs in zip(*found, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        if not error < 2e-2:
            raise AssertionError(f"a result of shape {tuple(ours.shape)} is off by {error:.1e}")


def _peer_module(name: str) -> Any:
    """`mamba_ssm.ops.triton.NAME`, whose package needs its CUDA part only for what is not used."""
    if not compares_peers():
        return None
    if "mamba_ssm" not in sys.modules:
        spec = find_spec("mamba_ssm")
        if spec is None:
            return None
        package = types.ModuleType("mamba_ssm")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["mamba_ssm"] = package
    try:
        return __import__(f"mamba_ssm.ops.triton.{name}", fromlist=["x"])
    except ImportError:
        return None
