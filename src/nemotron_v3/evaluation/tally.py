"""Sums of scores: by document, and by place in the document."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from nemotron_v3.config.typed import from_object
from nemotron_v3.evaluation.result import PLACES, Places
from nemotron_v3.evaluation.streaming import Window


@dataclass
class Partial:
    """What was scored of a document so far, or of several.

    Attributes:
        nats: minus the sum of the log-probabilities.
        tokens: how many count.
        place_nats: fp64 `[PLACES]`, `nats` by power of 2 of the place.
        place_tokens: int64 `[PLACES]`.
    """

    nats: float = 0.0
    tokens: int = 0
    place_nats: Tensor = field(default_factory=lambda: torch.zeros(PLACES, dtype=torch.float64))
    place_tokens: Tensor = field(default_factory=lambda: torch.zeros(PLACES, dtype=torch.int64))

    def add(self, window: Window) -> None:
        """Add a window's scores."""
        self.nats -= float(window.scores.sum())
        self.tokens += int(window.counts.sum())
        places = torch.arange(window.start, window.start + len(window.scores))
        powers = torch.frexp(places.double())[1].long() - 1
        self.place_nats -= torch.bincount(powers, window.scores, PLACES)
        self.place_tokens += torch.bincount(powers[window.counts], minlength=PLACES)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which keeps every bit of a float."""
        used = int(self.place_tokens.nonzero().max()) + 1 if self.place_tokens.any() else 0
        return {
            "nats": self.nats,
            "tokens": self.tokens,
            "place_nats": self.place_nats[:used].tolist(),
            "place_tokens": self.place_tokens[:used].tolist(),
        }

    @classmethod
    def from_dict(cls, told: Any) -> Self:
        """What `to_dict` told; raises `ValueError` for anything else."""
        plain = from_object(_Plain, told, "a score")
        made = cls(plain.nats, plain.tokens)
        for name in ("place_nats", "place_tokens"):
            values = torch.tensor(getattr(plain, name), dtype=getattr(made, name).dtype)
            getattr(made, name)[: len(values)] = values
        return made


@dataclass(frozen=True)
class _Plain:
    """A `Partial` as JSON holds it.

    Raises:
        ValueError: more places than there are, or tokens that are not those of the places.
    """

    nats: float
    tokens: int
    place_nats: list[float]
    place_tokens: list[int]

    def __post_init__(self) -> None:
        if not len(self.place_nats) == len(self.place_tokens) <= PLACES:
            raise ValueError(
                f"{len(self.place_nats)} place_nats and {len(self.place_tokens)} place_tokens: "
                f"give equally many, at most {PLACES}"
            )
        if self.tokens != sum(self.place_tokens) or min(self.place_tokens, default=0) < 0:
            raise ValueError(f"tokens is {self.tokens}, and place_tokens are {self.place_tokens}")


class Tally:
    """What was scored of a source's documents.

    Args:
        documents: how many the source has.

    Attributes:
        nats: fp64 `[documents]`.
        tokens: int64 `[documents]`.
        done: int64 `[documents]`, 1 where a document was scored.
        place_nats, place_tokens: see `Partial`.
    """

    def __init__(self, documents: int):
        self.nats = torch.zeros(documents, dtype=torch.float64)
        self.tokens = torch.zeros(documents, dtype=torch.int64)
        self.done = torch.zeros(documents, dtype=torch.int64)
        whole = Partial()
        self.place_nats, self.place_tokens = whole.place_nats, whole.place_tokens

    def add(self, documents: Sequence[int], parts: Sequence[Partial]) -> None:
        """Add documents that were scored whole; one that is there already is left as it is.

        Raises:
            ValueError: a document that the source has not, or not a part for each.
        """
        if len(documents) != len(parts):
            raise ValueError(f"{len(documents)} documents have {len(parts)} scores")
        if beyond := [number for number in documents if not 0 <= number < len(self.done)]:
            raise ValueError(f"there is no document {beyond[0]}: the source has {len(self.done)}")
        for document, part in zip(documents, parts, strict=True):
            if self.done[document]:
                continue
            self.nats[document], self.tokens[document] = part.nats, part.tokens
            self.done[document] = 1
            self.place_nats += part.place_nats
            self.place_tokens += part.place_tokens

    @property
    def tensors(self) -> list[Tensor]:
        """What is summed over processes that scored different documents."""
        return [self.nats, self.tokens, self.done, self.place_nats, self.place_tokens]

    @property
    def left(self) -> list[int]:
        """Documents that are not scored yet."""
        return (self.done == 0).nonzero()[:, 0].tolist()

    def places(self) -> Places:
        used = int(self.place_tokens.nonzero().max()) + 1 if self.place_tokens.any() else 0
        starts = [2**power for power in range(used)]
        return Places(starts, self.place_tokens[:used].tolist(), self.place_nats[:used].tolist())
