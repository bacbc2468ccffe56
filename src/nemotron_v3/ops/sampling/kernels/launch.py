"""What the kernels of sampling are launched with, and in which order."""

import torch
from torch import Tensor

from nemotron_v3.ops.common.host import on_device_of_first, power_of_two, unit_stride
from nemotron_v3.ops.common.launch import Launcher
from nemotron_v3.ops.sampling.kernels import finish, passes
from nemotron_v3.ops.sampling.kernels.parts import DRAW, NONE, TOP_K, TOP_P
from nemotron_v3.ops.sampling.sizes import CHUNK, LEVELS, blocks_of, parts_of, workspace_size

ROWS, WARPS = 8, 8
# Of narrow logits, of which a thread loads eight side by side: rows lie within a thread then, and
# are added there.
NARROW_ROWS = 4
_stats = Launcher(passes.stats_kernel)
_scale = Launcher(passes.scale_kernel)
_descend = Launcher(passes.descend_kernel)
_finish = Launcher(finish.finish_kernel)


@on_device_of_first
def _run(
    logits: Tensor,
    uniform: Tensor,
    drawn: Tensor,
    active: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    penalty: Tensor | None,
    seen: Tensor | None,
    logprobs: Tensor | None,
    workspace: Tensor,
    out: Tensor,
) -> None:
    R, V = logits.shape
    blocks, stride = blocks_of(V), logits.stride(0)
    by = (top_k is not None, top_p is not None)
    sizes = parts_of(R, V, temperature is not None, any(by))
    arrays = dict(
        zip(sizes, workspace[: sum(sizes.values())].split(list(sizes.values())), strict=True)
    )
    stats, floors, tables = (arrays[name] for name in ("stats", "floors", "tables"))
    below = arrays["below"].view(torch.float32)
    block_c, tile = power_of_two(blocks), _tile(below)
    marked = None if seen is None else seen.view(torch.uint8)
    penalized, floored = seen is not None, min_p is not None
    top_k, top_p = drawn if top_k is None else top_k, temperature if top_p is None else top_p
    shaped = (logits, active, penalty if penalized else active, marked)
    _stats(R * blocks, (*shaped, stats), (V, blocks, stride), (CHUNK, penalized), WARPS)
    if temperature is not None:
        _scale(
            R * blocks,
            (*shaped, temperature, min_p, stats, below, floors, tables),
            (V, blocks, stride),
            (*_tile(logits), block_c, penalized, floored, any(by), by[0]),
            WARPS,
        )
        previous = NONE
        for query in (TOP_K, TOP_P, DRAW) if any(by) else ():
            if query == DRAW or by[query]:
                for level in range(1, LEVELS):
                    counted = query == TOP_K or (query == TOP_P and level == LEVELS - 1)
                    _descend(
                        R * blocks,
                        (
                            *(below, active, temperature, top_k, top_p, uniform, drawn, stats),
                            *(floors, tables, arrays["records"], arrays["kept"]),
                        ),
                        (V, R, blocks, uniform.shape[0], level),
                        (query, previous, level == 1, counted, *tile, block_c, *by),
                        WARPS,
                    )
                previous = query
    _finish(
        R,
        (
            *(logits, active, marked, temperature, top_k, top_p, min_p, uniform, drawn, stats),
            *(below, floors, tables, arrays["records"], logprobs, out),
        ),
        (V, R, blocks, uniform.shape[0], stride),
        (
            *(CHUNK, block_c, temperature is not None, floored, *by, penalized),
            logprobs is not None,
        ),
        WARPS,
    )


def _tile(x: Tensor) -> tuple[int, int]:
    """How a chunk of these numbers is laid out."""
    rows = ROWS if x.element_size() == 4 else NARROW_ROWS
    return rows, CHUNK // rows


def sample(
    logits: Tensor,
    uniform: Tensor,
    drawn: Tensor,
    active: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    penalty: Tensor | None = None,
    seen: Tensor | None = None,
    logprobs: Tensor | None = None,
    workspace: Tensor | None = None,
    out: Tensor,
) -> Tensor:
    """See `ops.sample`."""
    R, V = logits.shape
    if R == 0:
        return out
    if workspace is None:
        cuts = top_k is not None or top_p is not None
        size = workspace_size(R, V, draws=temperature is not None, cuts=cuts)
        workspace = torch.empty(size, dtype=torch.float64, device=logits.device)
    given = unit_stride(logits), uniform.contiguous(), drawn, active
    numbers = temperature, top_k, top_p, min_p, penalty
    _run(*given, *numbers, seen, logprobs, workspace.view(-1), out)
    return out
