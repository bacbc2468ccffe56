"""What ops on the slots of a fixed batch are told: where each stands, and which move on."""

import torch
from torch import Tensor

INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64)


def check_slots(slots: int, positions: Tensor | None, active: Tensor) -> None:
    """Raises ValueError unless positions are int64 and active bool or integers, one a slot each."""
    if positions is not None and (positions.shape != (slots,) or positions.dtype != torch.int64):
        raise ValueError(
            f"positions {tuple(positions.shape)} in {positions.dtype}: int64 ({slots},) is needed"
        )
    if active.shape != (slots,) or active.dtype not in INTEGERS:
        raise ValueError(
            f"active {tuple(active.shape)} in {active.dtype}: bool or integers ({slots},) are "
            "needed"
        )


def check_out(out: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless a result can be written there."""
    if tuple(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out {tuple(out.shape)} in {out.dtype} does not fit: contiguous {shape} in {dtype} "
            "is needed"
        )


def check_workspace(workspace: Tensor | None, needed: int, dtype: torch.dtype) -> None:
    """Raises ValueError unless a workspace, where one is given, has room."""
    if workspace is None:
        return
    if workspace.dtype != dtype or workspace.numel() < needed or not workspace.is_contiguous():
        raise ValueError(
            f"workspace {tuple(workspace.shape)} in {workspace.dtype}: {needed} contiguous "
            f"elements in {dtype} are needed"
        )
