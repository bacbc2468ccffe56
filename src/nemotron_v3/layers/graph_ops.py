"""Ops as single nodes of a graph that `torch.compile` makes.

They work out index tables on the host from the lengths of documents or the loads of experts. A
graph that held these would be compiled anew for others, or not at all; so each op is one node,
which is given the number of its layout (`layout/handles.py`). The backward node computes the op
again: a graph saves the op's inputs alone.

Letters: T packed tokens, H query heads, P head width, K experts a token; of Mamba-2: see
`ops.mamba2`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.layout import SequenceLayout, handles

_library = torch.library.Library("nemotron_v3", "FRAGMENT")
_AUTOGRAD = (
    torch._C.DispatchKey.AutogradCPU,
    torch._C.DispatchKey.AutogradCUDA,
    torch._C.DispatchKey.AutogradOther,
    torch._C.DispatchKey.ADInplaceOrView,
)


def can_take(layout: SequenceLayout | None) -> bool:
    """Whether a compiler is at work, on no layout or one that was made outside of its graph."""
    return torch.compiler.is_compiling() and (layout is None or layout.handle != handles.UNKNOWN)


def _like_first(*args: Any) -> Tensor:
    return torch.empty_like(args[0], memory_format=torch.contiguous_format)


def _define(
    name: str,
    tensors: Sequence[str],
    settings: str,
    run: Callable[..., Tensor],
    result: Callable[..., Tensor] = _like_first,
) -> Callable[..., Tensor]:
    """A node `nemotron_v3::NAME` and that of its gradients.

    Args:
        tensors: their names, with a `?` behind one that may be absent.
        settings: the schema of all other arguments.
        run: computes it from tensors and settings.
        result: an empty result, from the same arguments.
    """
    inputs = ", ".join(
        f"Tensor? {tensor[:-1]}" if tensor.endswith("?") else f"Tensor {tensor}"
        for tensor in tensors
    )
    count = len(tensors)
    _library.define(f"{name}({inputs}, {settings}) -> Tensor")
    _library.define(f"{name}_backward(Tensor grad, {inputs}, {settings}) -> Tensor[]")
    backward_op = getattr(torch.ops.nemotron_v3, f"{name}_backward").default

    def gradients(grad: Tensor, *args: Any) -> list[Tensor]:
        return _recomputed(run, count, grad, args)

    def fake_gradients(grad: Tensor, *args: Any) -> list[Tensor]:
        return [torch.empty_like(t) for t in _differentiable(args[:count])]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.settings = inputs[count:]

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        found = iter(backward_op(grad, *tensors, *ctx.settings))
        chosen = {id(t) for t in _differentiable(tensors)}
        return (
            *(next(found) if id(t) in chosen else None for t in tensors),
            *(None for _ in ctx.settings),
        )

    for part, function in ((name, run), (f"{name}_backward", gradients)):
        _library.impl(part, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"nemotron_v3::{name}", result, lib=_library)
    torch.library.register_fake(f"nemotron_v3::{name}_backward", fake_gradients, lib=_library)
    torch.library.register_autograd(
        f"nemotron_v3::{name}", backward, setup_context=keep, lib=_library
    )
    return getattr(torch.ops.nemotron_v3, name).default


def _differentiable(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None and t.is_floating_point()]


def _recomputed(
    run: Callable[..., Tensor], count: int, grad: Tensor, args: tuple[Any, ...]
) -> list[Tensor]:
    """The gradients of `run` in its floating-point tensors, zeros where it has none."""
    leaves = [
        t.detach().requires_grad_() if t is not None and t.is_floating_point() else t
        for t in args[:count]
    ]
    # A node runs below autograd, whose keys are shut off: here it is asked for.
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in _AUTOGRAD:
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        y = run(*leaves, *args[count:])
        wanted = _differentiable(leaves)
        found = torch.autograd.grad(y, wanted, grad, allow_unused=True)
    pairs = zip(found, wanted, strict=True)
    return [torch.zeros_like(t) if g is None else g.contiguous() for g, t in pairs]


def _inner_width(zxbcdt: Tensor, *args: Any) -> Tensor:
    return zxbcdt.new_empty(zxbcdt.shape[0], args[5].shape[0])  # [T, H*P], as the norm's weight


def _run_mamba2(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    n_groups: int,
    head_dim: int,
    state_size: int,
    chunk_size: int,
    dt_min: float,
    dt_max: float,
    eps: float,
    layout: int,
    impl: str,
) -> Tensor:
    y, _, _ = ops.mamba2(
        zxbcdt,
        conv_weight,
        conv_bias,
        dt_bias,
        A_log,
        D,
        norm_weight,
        n_groups=n_groups,
        head_dim=head_dim,
        state_size=state_size,
        chunk_size=chunk_size,
        dt_limit=(dt_min, dt_max),
        eps=eps,
        layout=handles.layout_of(layout),
        return_final_states=False,
        impl=impl,
    )
    return y.contiguous()


def _run_attention(q: Tensor, k: Tensor, v: Tensor, layout: int, impl: str) -> Tensor:
    y = ops.attention(q, k, v, layout=handles.layout_of(layout), impl=impl)
    return y.contiguous()


def _run_experts(
    x: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, indices: Tensor, impl: str
) -> Tensor:
    return ops.experts(x, indices, weights, up_proj, down_proj, impl=impl).contiguous()


_mamba2 = _define(
    "mamba2_node",
    ("zxbcdt", "conv_weight", "conv_bias?", "dt_bias", "A_log", "D", "norm_weight"),
    "int n_groups, int head_dim, int state_size, int chunk_size, float dt_min, float dt_max, "
    "float eps, SymInt layout, str impl",
    _run_mamba2,
    _inner_width,
)
_attention = _define("attention_node", ("q", "k", "v"), "SymInt layout, str impl", _run_attention)
_experts = _define(
    "experts_node",
    ("x", "weights", "up_proj", "down_proj", "indices"),
    "str impl",
    _run_experts,
)


def _shift_labels(labels: Tensor, layout: int, tokens: int) -> Tensor:
    return ops.shift_labels(labels, handles.layout_of(layout))


_library.define("shift_labels_node(Tensor labels, SymInt layout, SymInt tokens) -> Tensor")
_library.impl("shift_labels_node", _shift_labels, "CompositeExplicitAutograd")
torch.library.register_fake(
    "nemotron_v3::shift_labels_node",
    lambda labels, layout, tokens: labels.new_empty(tokens),
    lib=_library,
)


def shift_labels(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """`ops.shift_labels`."""
    node = torch.ops.nemotron_v3.shift_labels_node.default
    return node(labels, layout.handle, layout.num_tokens)


def mamba2(zxbcdt: Tensor, *weights: Tensor | None, **settings: Any) -> tuple[Tensor, None, None]:
    """`ops.mamba2` from the first token of each document on, without the states after it."""
    low, high = settings["dt_limit"]
    sizes = [settings[name] for name in ("n_groups", "head_dim", "state_size", "chunk_size")]
    handle, impl = settings["layout"].handle, settings["impl"]
    y = _mamba2(zxbcdt, *weights, *sizes, low, high, settings["eps"], handle, impl)
    return y, None, None


def attention(q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout, impl: str) -> Tensor:
    """`ops.attention` without a mask or dropout."""
    return _attention(q, k, v, layout.handle, impl)


def experts(
    x: Tensor, indices: Tensor, weights: Tensor, up_proj: Tensor, down_proj: Tensor, impl: str
) -> Tensor:
    """`ops.experts`."""
    return _experts(x, weights, up_proj, down_proj, indices, impl)
