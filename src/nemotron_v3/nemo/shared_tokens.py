"""Tokens that processes share, as NeMo AutoModel's context parallelism cuts them.

Each row of a batch, or each document of a pack without a batch dimension, is cut into 2 R pieces of
one length. Process r has pieces r and 2 R - 1 - r, an early and a late one: all attend to as many
pairs. What its layers need of the other tokens comes by this package's `parallel`: a mamba layer
hands its states on, attention gathers keys and values.

Letters: R processes, B batch, S tokens of a row on one process, T packed tokens on one process.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemotron_v3.layers.context import full_name
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.parallel.collectives import gathered
from nemotron_v3.parallel.context_carry import ContextCarry
from nemotron_v3.parallel.shares import Shares
from nemotron_v3.parallel.token_group import SharedTokens

_GROUP = "nemotron_v3_token_group"  # where attention keeps the group of `setup_cp_attention`
_WAY_OUT = "train without context parallelism, or call nemotron_v3.nemo.undo(model)"


def group_of(layer: Any) -> ProcessGroup | None:
    """The processes that a parallelizer has told a mixer, or its block, to share tokens with.

    Raises:
        ValueError: a `cp` of several processes that does not say which they are.
    """
    mixer = getattr(layer, "mixer", layer)
    shared = vars(mixer).get(_GROUP)
    if shared is not None:
        return shared.group
    cp = getattr(mixer, "cp", None)
    if cp is None or cp.cp_size == 1:
        return None
    group = getattr(cp, "cp_group", None)
    if not isinstance(group, ProcessGroup):
        raise ValueError(
            f"mixer.cp is a {full_name(cp)} of {cp.cp_size} processes, whose cp_group is a "
            f"{full_name(group)}: set NeMo AutoModel's MambaContextParallel, {_WAY_OUT}"
        )
    return group


def share_attention(layer: nn.Module, mesh: Any) -> None:
    """Let a layer of attention share tokens with the processes of a mesh of one dimension.

    Raises:
        ValueError: something that is no such mesh.
    """
    get_group = getattr(mesh, "get_group", None)
    group = None if get_group is None else get_group()
    if not isinstance(group, ProcessGroup):
        raise ValueError(f"cp_mesh is {mesh!r}: give a DeviceMesh of one dimension")
    if group.size() > 1:
        vars(layer)[_GROUP] = SharedTokens(group, "zigzag")


def shares_attention(layer: nn.Module) -> bool:
    """Whether `share_attention` has been called."""
    return _GROUP in vars(layer)


def check_size(told: Mapping[str, Any], group: ProcessGroup | None) -> None:
    """Compare `cp_size` and `cp_rank` with the group of a layer, where a caller gives them.

    Raises:
        ValueError: they differ, or there is no group.
    """
    size, rank = int(told.get("cp_size", 1)), told.get("cp_rank")
    if group is None:
        if size != 1:
            raise ValueError(
                f"cp_size={size}, but no parallelizer has told the layer which processes share its "
                f"tokens (mixer.cp, setup_cp_attention): {_WAY_OUT}"
            )
    elif size not in (1, group.size()) or rank not in (None, 0, group.rank()):
        raise ValueError(
            f"cp_size={size}, cp_rank={rank}, but the layer's group has {group.size()} processes "
            f"and this is number {group.rank()}: leave both out, or give those"
        )


def whole_shape(shape: tuple[int, ...], group: ProcessGroup) -> tuple[int, ...]:
    """The grid of the tokens of all processes."""
    return (*shape[:-1], shape[-1] * group.size())


def whole_mask(mask: Tensor, shape: tuple[int, ...], group: ProcessGroup) -> Tensor:
    """A padding mask `[B, S]` of each process -> `[B, R S]` of all, in the order of the tokens.

    One that covers all tokens already is taken as it is.

    Raises:
        ValueError: another shape, or a pack, whose padding cannot be put together from masks.
    """
    whole = whole_shape(shape, group)
    if tuple(mask.shape) == whole and len(whole) == 2:
        return mask
    if tuple(mask.shape) != shape or len(shape) != 2 or shape[-1] % 2:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; {group.size()} processes share a grid "
            f"of {whole}: give the mask of this process's tokens, an even number a row, or of all "
            "of them (batch, seq_len); in a pack say where padding is by cu_seqlens_padded"
        )
    parts = gathered(mask.long()[None], group).unflatten(-1, (2, -1))  # [R, B, 2, S / 2]
    return torch.cat([parts[:, :, 0], parts[:, :, 1].flip(0)]).movedim(0, 1).flatten(1)


def share(
    whole: SequenceLayout, slots: list[int] | None, shape: tuple[int, ...], group: ProcessGroup
) -> tuple[SequenceLayout, ContextCarry]:
    """How the tokens of this process lie, and what stands for the others.

    Args:
        whole: of the tokens of all processes.
        slots: where the documents of a pack begin, with their padding, and where it ends; None cuts
            row by row.
        shape: the grid of this process.
        group: the processes.

    Raises:
        ValueError: rows or documents that cannot be cut into 2 R pieces of one length.
    """
    R = group.size()
    width = whole.shape[-1]
    rows = whole.shape[0] if len(whole.shape) == 2 else 1
    ends = [width * row for row in range(rows + 1)] if slots is None else slots
    edges = [0]
    for start, end in pairwise(ends):
        if (end - start) % (2 * R):
            raise ValueError(
                f"{end - start} tokens between {R} processes: rows, and documents of a pack with "
                f"their padding, are as long as a multiple of {2 * R}"
            )
        step = (end - start) // (2 * R)
        edges += [start + step * (i + 1) for i in range(2 * R)]
    if edges[-1] != rows * width:
        raise ValueError(
            f"cu_seqlens ends at {edges[-1]}, {R} processes share {rows * width} tokens: its last "
            "entry must be the number of all"
        )
    ranks = [*range(R), *reversed(range(R))] * (len(ends) - 1)
    shares = Shares.at(whole.packed, _among_real(edges, whole), ranks, group.rank())
    local = shares.local
    real = _own_real(edges, shares, whole)
    own = SequenceLayout(shape, local.lengths, local.cu_seqlens, real)
    return own, ContextCarry(shares, group)


def _among_real(edges: list[int], whole: SequenceLayout) -> list[int]:
    """Places on the grid as numbers of real tokens before them."""
    if whole.token_index is None:
        return edges
    return torch.searchsorted(whole.token_index.cpu(), torch.tensor(edges)).tolist()


def _own_real(edges: list[int], shares: Shares, whole: SequenceLayout) -> Tensor | None:
    """The places of this process's real tokens on its grid; None where all are real."""
    if whole.token_index is None:
        return None
    real = torch.zeros(edges[-1], dtype=torch.bool)
    real[whole.token_index.cpu()] = True
    own = torch.cat([real[edges[j] : edges[j + 1]] for j in shares.own])
    return own.nonzero().flatten().to(whole.device)


def refuse_dropout() -> NoReturn:
    """Raises ValueError for what attention over several processes does not offer."""
    raise ValueError(
        "attention_dropout acts on pairs of tokens, which processes share here: set it to 0, or "
        f"{_WAY_OUT}"
    )


def is_ring_active() -> bool:
    """Whether PyTorch's `context_parallel` is entered, which puts its own function in the place of
    `scaled_dot_product_attention`: for layers that each hold a part of the tokens."""
    return "_context_parallel" in (getattr(F.scaled_dot_product_attention, "__module__", "") or "")


def refuse_ring(layer: nn.Module) -> None:
    """Raises ValueError where the tokens are shared and a layer does not know with whom."""
    if is_ring_active():
        raise ValueError(
            f"PyTorch's context_parallel is entered, and no parallelizer has told this "
            f"{full_name(layer)} which processes share its tokens: call its "
            f"setup_cp_attention(cp_mesh), or {_WAY_OUT}"
        )


@contextmanager
def local_attention() -> Iterator[None]:
    """PyTorch's own attention, of what is at hand, while its `context_parallel` is entered."""
    if not is_ring_active():
        yield
        return
    ring = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = torch.ops.aten.scaled_dot_product_attention
    every = [kind for kind in SDPBackend.__members__.values() if kind.name not in _NO_BACKEND]
    try:
        with sdpa_kernel(every):
            yield
    finally:
        F.scaled_dot_product_attention = ring


_NO_BACKEND = ("ERROR", "OVERRIDEABLE")
