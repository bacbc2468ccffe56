"""The choice of tokens by `ops.sample`: what the options ask, in tensors that stay where they are.

Letters: R rows or slots, V vocabulary, n uniform numbers a row.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from nemotron_v3 import ops
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.ops.sampling.sizes import workspace_size


def normal(number: float, dtype: torch.dtype) -> float:
    """`number`, above 0, as a normal number of `dtype`, of which there are fewer than a host has:
    a kernel would take a smaller one for 0."""
    info = torch.finfo(dtype)
    return min(max(float(number), info.tiny), info.max)


class Asked(NamedTuple):
    """What takes part in a choice. A CUDA graph is captured for this; how much is in tensors."""

    draws: bool
    top_k: bool
    top_p: bool
    min_p: bool
    penalty: bool
    logprobs: bool

    @classmethod
    def of(cls, options: GenerationOptions) -> Self:
        draws = options.do_sample
        return cls(
            draws=draws,
            top_k=draws and options.top_k > 0,
            top_p=draws and options.top_p < 1,
            min_p=draws and options.min_p > 0,
            penalty=options.repetition_penalty != 1,
            logprobs=options.return_logprobs,
        )


class Choice:
    """One token of each row; no value is read on the host, and, after `reserve`, nothing allocated.

    Attributes:
        drawn: int64 `[R]`, the draws of each row so far.
        tokens: int64 `[R]`, what was chosen last.
        logprobs: `[R]` in the dtype of the arithmetic, where asked for.
    """

    def __init__(self, asked: Asked, rows: int, dtype: torch.dtype, device: torch.device):
        self.asked, self._dtype = asked, dtype
        kinds = {name: dtype for name in ("top_p", "min_p", "penalty") if getattr(asked, name)}
        if asked.draws:
            kinds["temperature"] = dtype
        if asked.top_k:
            kinds["top_k"] = torch.int64
        self._numbers = {
            name: torch.zeros(rows, dtype=kind, device=device) for name, kind in kinds.items()
        }
        self.drawn = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, dtype=dtype, device=device) if asked.logprobs else None
        self._nothing = torch.zeros(1, rows, dtype=torch.float64, device=device)
        self._workspace: Tensor | None = None

    def reserve(self, vocab_size: int) -> None:
        """Make room once for what a choice among so many tokens needs on a GPU."""
        if self.drawn.is_cuda:
            cuts = self.asked.top_k or self.asked.top_p
            size = workspace_size(len(self.drawn), vocab_size, draws=self.asked.draws, cuts=cuts)
            self._workspace = self._nothing.new_empty(size)

    def take(self, options: GenerationOptions) -> None:
        """The numbers of these options, for every row alike."""
        for name, tensor in self._numbers.items():
            number = getattr(options, "repetition_penalty" if name == "penalty" else name)
            tensor.fill_(normal(number, self._dtype) if name == "temperature" else number)

    def __call__(
        self, logits: Tensor, active: Tensor, uniform: Tensor | None, seen: Tensor | None
    ) -> None:
        """Choose for the first rows, as many as there are logits.

        Args:
            logits: `[rows, V]`.
            active: `[rows]`; nothing of a row changes where it is 0.
            uniform: fp64 `[n, rows]`, where draws are asked for.
            seen: bool `[rows, V]`, updated, where a penalty is.
        """
        rows = len(logits)
        numbers: dict[str, Any] = {name: tensor[:rows] for name, tensor in self._numbers.items()}
        ops.sample(
            logits,
            self._nothing[:, :rows] if uniform is None else uniform,
            self.drawn[:rows],
            active,
            **numbers,
            seen=seen,
            logprobs=None if self.logprobs is None else self.logprobs[:rows],
            workspace=self._workspace,
            out=self.tokens[:rows],
        )
