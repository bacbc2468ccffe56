"""The choice of the next tokens inside a step on fixed buffers.

Letters: R slots, V vocabulary.
"""

import torch
from torch import Tensor

from nemotron_v3.generation.choice import Asked, Choice
from nemotron_v3.generation.graphs.slots import Slots
from nemotron_v3.generation.sampling import BLOCK, Sampler


class Drawing:
    """Chooses from a step's logits, and gives every active slot its token for the next step.

    Attributes:
        choice: whose `tokens` and `logprobs` each step writes over.
    """

    def __init__(self, asked: Asked, logits: Tensor, slots: Slots):
        R, V = logits.shape
        wide = torch.promote_types(logits.dtype, torch.float32)
        self.choice = Choice(asked, R, wide, logits.device)
        self.choice.reserve(V)
        self._logits, self._slots = logits, slots
        self._uniform: Tensor | None = None
        self._seen: Tensor | None = None
        if asked.draws:
            self._uniform = torch.zeros(BLOCK, R, dtype=torch.float64, device=logits.device)
        if asked.penalty:
            self._seen = torch.zeros(R, V, dtype=torch.bool, device=logits.device)

    def __call__(self) -> None:
        choice, slots = self.choice, self._slots
        choice(self._logits, slots.active, self._uniform, self._seen)
        # Of a slot without a token the host is told later; until then something is fed to it.
        torch.clamp(choice.tokens, min=0, out=slots.tokens)

    def load(self, sampler: Sampler) -> None:
        """Go on where a sampler stands, its rows in the first slots."""
        self.choice.take(sampler.options)
        self.choice.drawn.zero_()
        if sampler.uniform is not None:
            self.choice.drawn.fill_(sampler.uniform.used % BLOCK)
            self._take_numbers(sampler.uniform.block)
        if self._seen is not None and sampler.seen is not None:
            self._seen[: len(sampler.seen)] = sampler.seen

    def advance(self, sampler: Sampler) -> None:
        """To be called before each step: the sampler counts the draws that the step makes."""
        if sampler.uniform is not None and sampler.uniform.advance():
            self._take_numbers(sampler.uniform.block)

    def store(self, sampler: Sampler) -> None:
        """Tell a sampler which tokens its rows hold now."""
        if self._seen is not None and sampler.seen is not None:
            sampler.seen.copy_(self._seen[: len(sampler.seen)])

    def _take_numbers(self, block: Tensor) -> None:
        if self._uniform is not None:
            self._uniform[: len(block), : block.shape[1]] = block
