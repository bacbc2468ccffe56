"""Linear cross entropy with the softmax and its gradient in Triton, the products by cuBLAS.

Letters: T packed tokens, D width, V vocabulary. A chunk's logits `[rows, V]` are in the dtype of
the weight for the mean loss, in fp32 for log-probabilities; their gradient, in the dtype of the
weight, takes their place: in 16 bits over fp32, the second half of each row (README.md, 'How the
fast forms compute it').
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_v3.ops import compat
from nemotron_v3.ops.common.host import can_bypass_dispatcher, interpreted, programs, register
from nemotron_v3.ops.common.jit import kernel
from nemotron_v3.ops.common.precision import needs_grad
from nemotron_v3.ops.linear_cross_entropy._chunks import chunk_rows, sum_dtype


@kernel
def softmax_kernel(
    logits,
    gradient,
    targets,
    log_p,
    log_z,
    dlog_p,
    dlog_z,
    count,
    V,
    stride_logits,
    stride_gradient,
    ignore_index,
    z_loss,
    GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr,
    NARROWER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """A program is a token. WEIGHTED: by the cotangents of `log_p` and `log_z`, not of the loss,
    whose gradient is divided by `count` where that is given.
    """
    i_t = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK_V)
    p_row = logits + i_t * stride_logits
    i_target = tl.load(targets + i_t)
    counted = i_target != ignore_index
    known = (i_target >= 0) & (i_target < V)
    # Before the gradient takes its place.
    b_target = tl.load(p_row + tl.where(known, i_target, 0)).to(tl.float32)
    b_target = tl.where(known, b_target, float("nan"))

    # [BLOCK_V]: of each lane, the largest logit so far and the sum of exponentials relative to it
    b_m = tl.full([BLOCK_V], -1e30, tl.float32)
    b_s = tl.zeros([BLOCK_V], tl.float32)
    for i_v in range(0, V, BLOCK_V):
        m_v = i_v + o_v < V
        b_x = tl.load(
            p_row + i_v + o_v,
            mask=m_v,
            other=float("-inf"),
            eviction_policy="evict_last" if GRADIENT else "",  # they are read again
        ).to(tl.float32)
        b_larger = tl.maximum(b_m, b_x)
        b_s = b_s * tl.exp(b_m - b_larger) + tl.exp(b_x - b_larger)
        b_m = b_larger
    b_largest = tl.max(b_m, 0)
    b_total = tl.sum(b_s * tl.exp(b_m - b_largest), 0)
    b_log_sum = tl.log(b_total)
    b_log_z = b_largest + b_log_sum
    if not WEIGHTED:
        tl.store(log_p + i_t, tl.where(counted, b_target - b_largest - b_log_sum, 0.0))
        tl.store(log_z + i_t, tl.where(counted, b_log_z, 0.0))

    if GRADIENT:
        if WEIGHTED:
            b_one = -tl.load(dlog_p + i_t)
            b_all = tl.load(dlog_z + i_t) + b_one
        else:
            b_one = 1.0
            if count is not None:
                b_one /= tl.load(count)
            b_all = b_one * (1.0 + 2.0 * z_loss * b_log_z)
        b_scale = b_all / b_total
        p_out = gradient + i_t * stride_gradient
        # From the end, whose logits were read last and may still be in the cache.
        i_last = (tl.cdiv(V, BLOCK_V) - 1) * BLOCK_V
        for i_back in range(0, V, BLOCK_V):
            i_v = i_last - i_back
            m_v = i_v + o_v < V
            b_x = tl.load(p_row + i_v + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
            b_d = tl.exp(b_x - b_largest) * b_scale
            b_d -= tl.where(i_v + o_v == i_target, b_one, 0.0)
            b_d = tl.where(counted, b_d, 0.0)
            if NARROWER:
                # The gradient fills the second half of the row: block after block from the end, it
                # falls on logits of this block or of later ones. All threads have to have loaded.
                tl.debug_barrier()
            b_d = b_d.to(gradient.dtype.element_ty)
            tl.store(p_out + i_v + o_v, b_d, mask=m_v, eviction_policy="evict_first")


@kernel
def scale_kernel(x, out, dloss, divisor, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    """`x dloss / divisor`; in place nothing is touched where that is `x`."""
    b_scale = tl.load(dloss) / tl.load(divisor)
    if IN_PLACE:
        n = tl.where(b_scale == 1.0, 0, n)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for i in range(first, n, tl.num_programs(0) * BLOCK):
        o = i + tl.arange(0, BLOCK)
        b_x = tl.load(x + o, mask=o < n, other=0.0).to(tl.float32)
        tl.store(out + o, (b_x * b_scale).to(out.dtype.element_ty), mask=o < n)


# --- launchers ------------------------------------------------------------------------------------


class _Chunks:
    """The memory of one chunk's logits, and the products with it."""

    def __init__(self, hidden: Tensor, weight: Tensor, dtype: torch.dtype):
        self.hidden, self.weight = hidden, weight
        T, V = len(hidden), len(weight)
        self.rows = chunk_rows(T, V, dtype, hidden.device)
        padded = -(-V // 8) * 8  # rows that start at multiples of 16 bytes
        memory = hidden.new_empty(min(self.rows, T), padded, dtype=dtype)
        half = 0 if hidden.dtype == memory.dtype else padded
        self._logits, self._gradient = memory[:, :V], memory.view(hidden.dtype)[:, half : half + V]

    def logits(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Rows, their logits, and the place of the gradient."""
        for start in range(0, len(self.hidden), self.rows):
            rows = slice(start, min(len(self.hidden), start + self.rows))
            logits = self._logits[: rows.stop - start]
            _product(self.hidden[rows], self.weight.t(), logits)
            yield rows, logits, self._gradient[: rows.stop - start]

    def add_to_weight(self, total: Tensor, rows: slice, dlogits: Tensor) -> None:
        _product(dlogits.t(), self.hidden[rows], total, add=rows.start > 0)


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """`a b` into `out`, or added to it; the sums of the product are fp32."""
    if not a.is_cuda:  # the interpreter: a CPU's products in 16 bits return 16 bits
        product = a.float() @ b.float()
        out.copy_(product + out if add else product)
    elif out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif add:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


def _launch_softmax(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    tokens: tuple[Tensor | None, ...],
    count: Tensor | None,
    ignore_index: int,
    z_loss: float,
) -> None:
    """`tokens` are `log_p` and `log_z`, and their cotangents or Nones, `[rows]` each; `count`
    divides the gradient, unless None."""
    V = logits.shape[1]
    block, warps = _blocks(V)
    narrower = gradient is not None and gradient.dtype != logits.dtype
    softmax_kernel[(len(logits),)](
        *(logits, gradient, targets, *tokens, count, V, logits.stride(0)),
        0 if gradient is None else gradient.stride(0),
        *(ignore_index, z_loss, gradient is not None, tokens[2] is not None, narrower, block),
        num_warps=warps,
    )


def _blocks(V: int) -> tuple[int, int]:
    """(BLOCK_V, warps): 16 elements a thread, and few rows at a time, more of which are still in
    the cache when they are read again."""
    block = min(8192, max(128, triton.next_power_of_2(V)))
    return block, max(1, block // 512)


def _scale(x: Tensor, out: Tensor, dloss: Tensor, divisor: Tensor) -> None:
    """`x dloss / divisor` into `out`, which may be x."""
    n, block = x.numel(), 65536 if interpreted() else 2048
    if n:
        count = min(triton.cdiv(n, block), programs(x.device, 16))
        in_place = x.data_ptr() == out.data_ptr()
        scale_kernel[(count,)](x, out, dloss, divisor, n, in_place, block, num_warps=8)


# --- registration ---------------------------------------------------------------------------------


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    z_loss: float,
    of_hidden: bool,
    of_weight: bool,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    T, fp32 = len(hidden), {"dtype": torch.float32, "device": hidden.device}
    log_p, log_z = torch.empty(T, **fp32), torch.empty(T, **fp32)
    chunks = _Chunks(hidden, weight, logits_dtype)
    dhidden, dweight = _sums(hidden, weight, logits_dtype, of_hidden, of_weight)
    count = (targets != ignore_index).sum().clamp(min=1).to(torch.float32)
    # In fp16 a gradient over the count would underflow before a loss scale could save it.
    divide = count if weight.dtype != torch.float16 else None
    for rows, logits, gradient in chunks.logits():
        wanted = gradient if of_hidden or of_weight else None
        tokens = log_p[rows], log_z[rows], None, None
        _launch_softmax(logits, wanted, targets[rows], tokens, divide, ignore_index, z_loss)
        if of_hidden:
            _product(gradient, weight, dhidden[rows])
        if of_weight:
            chunks.add_to_weight(dweight, rows, gradient)
    loss = (z_loss * log_z.square() - log_p).sum() / count
    divisor = count if divide is None else torch.ones_like(count)
    return loss, log_p, log_z, divisor, dhidden, dweight


def _sums(
    hidden: Tensor, weight: Tensor, logits: torch.dtype, of_hidden: bool, of_weight: bool
) -> tuple[Tensor, Tensor]:
    """Where the gradients go; empty where they are not wanted."""
    T = len(hidden)
    chunks = -(-T // chunk_rows(T, len(weight), logits, hidden.device))
    dhidden = torch.empty(
        hidden.shape if of_hidden else 0, dtype=hidden.dtype, device=hidden.device
    )
    make = torch.empty if chunks else torch.zeros
    kind = {"dtype": sum_dtype(weight, chunks), "device": weight.device}
    return dhidden, make(weight.shape if of_weight else 0, **kind)


def _loss_fake(hidden, weight, targets, ignore_index, z_loss, of_hidden, of_weight, logits_dtype):
    T, fp32 = len(hidden), {"dtype": torch.float32, "device": hidden.device}
    scalar, tokens = torch.empty((), **fp32), torch.empty(T, **fp32)
    sums = _sums(hidden, weight, logits_dtype, of_hidden, of_weight)
    return scalar, tokens, torch.empty_like(tokens), torch.empty_like(scalar), *sums


def _loss_backward(
    dloss: Tensor, divisor: Tensor, dhidden: Tensor, dweight: Tensor, weight_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(dhidden), torch.empty_like(dweight, dtype=weight_dtype)
    for x, scaled in zip((dhidden, dweight), out, strict=True):
        _scale(x, scaled, dloss, divisor)
    return out


def _loss_backward_fake(dloss, divisor, dhidden, dweight, weight_dtype):
    return torch.empty_like(dhidden), torch.empty_like(dweight, dtype=weight_dtype)


def _loss_setup(ctx, inputs, output) -> None:
    hidden, weight, *_, ctx.of_hidden, ctx.of_weight, _ = inputs
    ctx.dtype = weight.dtype
    _, *others = output
    ctx.save_for_backward(*others[2:])
    ctx.mark_non_differentiable(*others)
    ctx.set_materialize_grads(False)  # of the sums of gradients, they would be as large


def _loss_autograd(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 8
    divisor, dhidden, dweight = ctx.saved_tensors
    if dweight.dtype == ctx.dtype and _nobody_needs(dloss, dhidden, dweight):
        for x in (dhidden, dweight):
            _scale(x, x, dloss, divisor)
    else:
        dhidden, dweight = _loss_backward_op(dloss, divisor, dhidden, dweight, ctx.dtype)
    dhidden = dhidden if ctx.of_hidden else None
    return dhidden, dweight if ctx.of_weight else None, *(None,) * 6


def _nobody_needs(*saved: Tensor) -> bool:
    """Whether this is the last backward pass over the graph, in plain eager mode: what was saved
    for it may then become its results."""
    return can_bypass_dispatcher(saved) and not compat.graph_is_kept()


_loss_backward_op = register(
    "linear_cross_entropy_backward(Tensor dloss, Tensor divisor, Tensor dhidden, Tensor dweight, "
    "ScalarType weight_dtype) -> (Tensor, Tensor)",
    _loss_backward,
    _loss_backward_fake,
)
_loss_op = register(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, int ignore_index, "
    "float z_loss, bool of_hidden, bool of_weight, ScalarType logits_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _loss,
    _loss_fake,
    setup_context=_loss_setup,
    backward=_loss_autograd,
)


def _tokens(
    hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    given = hidden, weight, targets, ignore_index, 0.0, False, False, torch.float32
    return _loss(*given)[1:3]


def _tokens_fake(hidden, weight, targets, ignore_index):
    log_p = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    return log_p, torch.empty_like(log_p)


def _tokens_backward(
    dlog_p: Tensor,
    dlog_z: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    of_hidden: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    chunks = _Chunks(hidden, weight, torch.float32)
    dhidden, dweight = _sums(hidden, weight, torch.float32, of_hidden, of_weight)
    for rows, logits, gradient in chunks.logits():
        tokens = None, None, dlog_p[rows], dlog_z[rows]
        _launch_softmax(logits, gradient, targets[rows], tokens, None, ignore_index, 0.0)
        if of_hidden:
            _product(gradient, weight, dhidden[rows])
        if of_weight:
            chunks.add_to_weight(dweight, rows, gradient)
    return dhidden, dweight.to(weight.dtype)


def _tokens_backward_fake(
    dlog_p, dlog_z, hidden, weight, targets, ignore_index, of_hidden, of_weight
):
    dhidden, dweight = _sums(hidden, weight, torch.float32, of_hidden, of_weight)
    return dhidden, torch.empty_like(dweight, dtype=weight.dtype)


def _tokens_setup(ctx, inputs, output) -> None:
    *tensors, ctx.ignore_index = inputs
    ctx.save_for_backward(*tensors)


def _tokens_autograd(ctx, dlog_p, dlog_z):
    hidden, weight, targets = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:2]
    cotangents = dlog_p.contiguous(), dlog_z.contiguous()
    dhidden, dweight = _tokens_backward_op(
        *cotangents, hidden, weight, targets, ctx.ignore_index, *wanted
    )
    return dhidden if wanted[0] else None, dweight if wanted[1] else None, None, None


_tokens_backward_op = register(
    "linear_log_probabilities_backward(Tensor dlog_p, Tensor dlog_z, Tensor hidden, Tensor weight, "
    "Tensor targets, int ignore_index, bool of_hidden, bool of_weight) -> (Tensor, Tensor)",
    _tokens_backward,
    _tokens_backward_fake,
)
_tokens_op = register(
    "linear_log_probabilities(Tensor hidden, Tensor weight, Tensor targets, int ignore_index) "
    "-> (Tensor, Tensor)",
    _tokens,
    _tokens_fake,
    setup_context=_tokens_setup,
    backward=_tokens_autograd,
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    per_token: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    wanted = needs_grad(hidden), needs_grad(weight)
    targets = targets.contiguous()
    given = hidden, weight, targets, ignore_index, z_loss, *wanted, weight.dtype
    loss, log_p, log_z, *_ = _loss_op(*given)
    return (loss, log_p, log_z) if per_token else loss


def linear_log_probabilities(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    return _tokens_op(hidden, weight, targets.contiguous(), ignore_index)
