"""From logits to one token a row.

Letters: R rows, V vocabulary, C candidates.

All arithmetic is in fp32 or wider. A draw inverts the cumulated probabilities at one uniform number
a row and step. Row r's numbers come from a generator of its own on the CPU, so they depend on its
seed and on how many tokens it has drawn, and on nothing else: not on the rows beside it, nor on the
device. Reading them ahead in blocks keeps the CPU and its copies out of the step.

On a GPU `ops.sample` chooses, by the same rules, without sorting a vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_v3.generation.choice import Asked, Choice, normal
from nemotron_v3.generation.options import GenerationOptions

BLOCK = 64  # uniform numbers drawn ahead
NO_TOKEN = -1  # of a row whose logits are not finite


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that are `seen` (bool `[R, V]`) less likely: `l / p`, or `l * p` below 0.

    A product out of the dtype's range is the last number in it; a logit of -inf, of a token that is
    never to come, stays.
    """
    info = torch.finfo(logits.dtype)
    penalty = normal(penalty, logits.dtype)
    changed = torch.where(logits > 0, logits / penalty, logits * penalty)
    changed = changed.clamp(info.min, info.max)
    return torch.where(seen & (logits > -torch.inf), changed, logits)


def divide(logits: Tensor, temperature: float) -> Tensor:
    """Logits `[R, V]` by a temperature, each row's largest being 0, so that none overflows."""
    below = logits - logits.amax(-1, keepdim=True)
    return below / normal(temperature, logits.dtype)


def candidates(
    logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[Tensor, Tensor | None]:
    """The tokens a draw may choose from.

    Args:
        logits: `[R, V]`, after temperature.
        top_k: the so many likeliest; 0 for all.
        top_p: of these, the fewest likeliest whose probabilities sum to at least `top_p`, as a
            part of their own sum.
        min_p: of these, those at least `min_p` times as likely as the likeliest.

    Returns:
        Probabilities `[R, C]`, which sum to 1 and are 0 where a token is not to be drawn, and the
        tokens they belong to, int64 `[R, C]`; None where they are all, in order.
    """
    tokens = None
    if 0 < top_k < logits.shape[-1]:
        logits, tokens = logits.topk(top_k, dim=-1)  # in falling order
    elif top_p < 1:
        logits, tokens = logits.sort(dim=-1, descending=True)
    probabilities = torch.softmax(logits, dim=-1)
    if top_p < 1:
        if tokens is None:  # top_k named all of them
            probabilities, tokens = probabilities.sort(dim=-1, descending=True)
        # A token stays while those before it have not reached top_p, so the first always does.
        before = probabilities.cumsum(-1) - probabilities
        least = normal(top_p, probabilities.dtype)
        probabilities = probabilities.masked_fill(before >= least, 0)
    if min_p > 0:
        least = min_p * probabilities.amax(-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < least, 0)
    return probabilities / probabilities.sum(-1, keepdim=True), tokens


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first index whose cumulated probability passes `uniform` (fp64 `[R]`, in [0, 1)).

    Never one of probability 0. The sum runs in fp64: in fp32 over a large vocabulary its rounding
    would be as large as the probability of a rare token.
    """
    cumulated = probabilities.to(torch.float64).cumsum(-1)
    total = cumulated[:, -1:]
    # `uniform * total` may round up to the total itself, behind which there is no token.
    target = torch.minimum(uniform[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulated, target, right=True)[:, 0]


class Uniform:
    """A stream of uniform numbers in [0, 1) for each row, from the row's own seed.

    Attributes:
        block: fp64 `[BLOCK, R]`, the present numbers of all rows; before the first draw `[0, R]`.
        used: how many of them each row has drawn.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._device = device
        self.block = torch.empty(0, len(seeds), dtype=torch.float64, device=device)
        self.used = 0

    def __call__(self) -> Tensor:
        """fp64 `[R]`."""
        self.advance()
        return self.block[self.used - 1]

    def advance(self) -> bool:
        """Count a draw of every row; whether a new block was begun for it."""
        begun = self.used == len(self.block)
        if begun:
            numbers = [
                torch.rand(BLOCK, generator=generator, dtype=torch.float64, device="cpu")
                for generator in self._generators
            ]
            block = torch.stack(numbers, dim=1)
            if self._device.type == "cuda":  # the host goes on while it is copied
                block = block.pin_memory()
            self.block, self.used = block.to(self._device, non_blocking=True), 0
        self.used += 1
        return begun

    def select(self, rows: Sequence[int], index: Tensor) -> None:
        """Go on with these rows alone."""
        self._generators = [self._generators[row] for row in rows]
        self.block = self.block.index_select(1, index)


class Sampler:
    """One token a row from its logits, as the options say.

    Args:
        options: see `GenerationOptions`.
        prompts: the tokens each row holds, int64 `[n]` each.
        vocab_size: V.
        like: a tensor of the logits' device and dtype.
        on_slots: whether `ops.sample` chooses; on a GPU by default.

    Attributes:
        asked: what takes part in the choice.
        uniform: the numbers that are drawn with, or None.
        seen: bool `[R, V]`, the tokens that each row holds, where they count.
    """

    def __init__(
        self,
        options: GenerationOptions,
        prompts: Sequence[Tensor],
        vocab_size: int,
        like: Tensor,
        on_slots: bool | None = None,
    ):
        self.options = options
        self.dtype: torch.dtype = torch.promote_types(like.dtype, torch.float32)
        device = like.device
        self.asked = Asked.of(options)
        self.uniform: Uniform | None = None
        self.seen: Tensor | None = None
        if options.do_sample:
            seeds = options.seeds(len(prompts))
            if seeds is None:
                seeds = torch.randint(2**62, (len(prompts),), device="cpu").tolist()
            self.uniform = Uniform(seeds, device)
        if options.repetition_penalty != 1:
            seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device="cpu")
            for row, prompt in enumerate(prompts):
                seen[row, prompt] = True
            self.seen = seen.to(device)
        self._choice: Choice | None = None
        if like.is_cuda if on_slots is None else on_slots:
            self._choice = Choice(self.asked, len(prompts), self.dtype, device)
            self._choice.take(options)
            # As the slots of a graph have it: its kernels are compiled for both at once.
            self._active = torch.ones(len(prompts), dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits `[R, V]` -> tokens int64 `[R]`, and their log-probabilities `[R]` if asked for.

        `NO_TOKEN` for a row that has NaN or +inf among its logits, or nothing but -inf.
        """
        if self._choice is not None:
            return self._choose(self._choice, logits)
        logits = logits.to(self.dtype)
        peak, tokens = logits.max(-1)  # a NaN is the largest of all
        shaped = logits
        if self.seen is not None:
            shaped = penalize_repetition(shaped, self.seen, self.options.repetition_penalty)
            tokens = shaped.argmax(-1) if self.uniform is None else tokens
        if self.uniform is not None:
            tokens = self._draw(shaped)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        logprobs = None
        if self.options.return_logprobs:
            logprobs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        return tokens.masked_fill(~peak.isfinite(), NO_TOKEN), logprobs

    def _choose(self, choice: Choice, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows are alike, so that the first places serve any."""
        rows = len(logits)
        uniform = None if self.uniform is None else self.uniform()[None]
        choice(logits, self._active[:rows], uniform, self.seen)
        logprobs = None if choice.logprobs is None else choice.logprobs[:rows].clone()
        return choice.tokens[:rows].clone(), logprobs

    def _draw(self, logits: Tensor) -> Tensor:
        options = self.options
        assert self.uniform is not None, "there are numbers where something is drawn"
        probabilities, tokens = candidates(
            divide(logits, options.temperature), options.top_k, options.top_p, options.min_p
        )
        # Where probabilities are no numbers, so that none is passed, the last index is as good.
        drawn = invert(probabilities, self.uniform()).clamp(max=probabilities.shape[-1] - 1)
        return drawn if tokens is None else tokens.gather(1, drawn[:, None])[:, 0]

    def select(self, rows: Sequence[int], index: Tensor) -> None:
        """Go on with these rows alone; `index` is int64 `[rows]`, the same on the device."""
        if self.uniform is not None:
            self.uniform.select(rows, index)
        if self.seen is not None:
            self.seen = self.seen.index_select(0, index)
