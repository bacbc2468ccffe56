"""What the tests of generation share."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nemotron_v3 import NemotronV3ForCausalLM
from tests.models import tokens

LENGTHS = (5, 1, 17, 9)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    return [tokens(length, seed=seed + row) for row, length in enumerate(lengths)]


def padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as a batch and its mask: padding left, right, or in between."""
    width = max(map(len, rows)) + 2 * (side == "mixed")
    ids = torch.full((len(rows), width), 7)  # a token like any other: the mask alone tells
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        if side == "mixed":  # scattered over the row
            scattered = torch.randperm(width, generator=torch.Generator().manual_seed(number))
            places = scattered[: len(row)].sort().values
        else:
            start = width - len(row) if side == "left" else 0
            places = torch.arange(start, start + len(row))
        ids[number, places] = row
        mask[number, places] = 1
    return ids, mask


@torch.no_grad()
def recomputed(model: NemotronV3ForCausalLM, prompt: Tensor, new_tokens: int) -> list[int]:
    """Greedy tokens, each from the whole sequence before it."""
    sequence = prompt
    for _ in range(new_tokens):
        best = model(sequence[None]).logits[0, -1].argmax()
        sequence = torch.cat([sequence, best[None]])
    return sequence[len(prompt) :].tolist()


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters are cut between tokens."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")
