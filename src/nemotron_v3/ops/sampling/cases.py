"""What the tests and benchmarks of sampling share: slots that ask for different things."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron_v3.ops.common.cases import Draw, Inputs


@dataclass(frozen=True)
class Case:
    """`asked` names what some slot asks for; `spread` is that of the logits."""

    name: str
    rows: int
    vocabulary: int
    asked: tuple[str, ...] = ()
    spread: float = 2.0
    equal: bool = False  # many logits are the same
    strided: bool = False


CASES = (
    Case("greedy", 5, 300),
    Case("greedy-penalty", 5, 300, ("penalty",), strided=True),
    Case("plain", 6, 517, ("temperature",)),
    Case("min-p", 6, 300, ("temperature", "min_p"), strided=True),
    Case("top-k", 6, 300, ("temperature", "top_k")),
    Case("top-p", 6, 300, ("temperature", "top_p")),
    Case("top-p-equal", 6, 300, ("temperature", "top_p"), equal=True),
    Case("all", 8, 300, ("temperature", "top_k", "top_p", "min_p", "penalty")),
    Case("all-flat", 8, 300, ("temperature", "top_k", "top_p", "min_p"), spread=0.05),
    Case("all-sharp", 8, 300, ("temperature", "top_k", "top_p", "min_p"), spread=30.0, equal=True),
)
NUMBERS = 8  # uniform numbers a slot


def make_inputs(
    case: Case, dtype: torch.dtype, device: torch.device | str, generator: torch.Generator
) -> Inputs:
    """Every third slot asks for nothing of what others ask; every fifth is not active."""
    draw = Draw(generator, dtype, device, case.strided)
    R, V = case.rows, case.vocabulary
    logits = draw.activation(R, V, scale=case.spread)
    if case.equal:
        logits = logits.mul_(2 / case.spread).round_().mul_(case.spread / 2)
    row = torch.arange(R, device=device)

    def asks(name: str, low: float, high: float, nothing: float) -> Tensor | None:
        if name not in case.asked:
            return None
        numbers = draw.uniform(R, low=low, high=high, wide=True)
        return numbers.where(row % 3 != 2, torch.as_tensor(nothing, dtype=numbers.dtype))

    options = {
        "active": row % 5 != 4,
        "drawn": draw.integers(R, high=3 * NUMBERS),
        "uniform": torch.rand(NUMBERS, R, generator=generator, dtype=torch.float64).to(device),
        "temperature": asks("temperature", 0.5, 1.5, 1.0),
        "top_p": asks("top_p", 0.2, 0.99, 1.0),
        "min_p": asks("min_p", 0.001, 0.2, 0.0),
        "penalty": asks("penalty", 0.7, 1.5, 1.0),
        "top_k": None,
        "seen": None,
        "out": torch.full((R,), 7, device=device),
        "logprobs": torch.zeros(R, dtype=draw.wide, device=device),
    }
    if "top_k" in case.asked:
        options["top_k"] = (draw.integers(R, high=V // 4) + 1).where(row % 3 != 2, 0)
    if "penalty" in case.asked:
        options["seen"] = draw.integers(R, V, high=4) == 0
    if "temperature" in case.asked:
        options["temperature"][-1:] = 0
    return Inputs({"logits": logits}, options)
