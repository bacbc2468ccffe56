"""How to generate: every option in one place, checked before anything runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Self

from nemotron_v3.config import NemotronV3Config

SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What `generate` and `stream` take beside the prompts.

    Attributes:
        max_new_tokens: most tokens a row gets.
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: divides the logits before drawing; 1 draws as the model predicts.
        top_k: draw from the so many likeliest tokens; 0 for all.
        top_p: then from the fewest of these that together have this probability; 1 for all.
        min_p: then from those at least this times as likely as the likeliest; 0 for all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that
            the row holds already, its prompt included (Keskar et al. 2019); 1 for none.
        eos_token_id: tokens that end a row; None for the config's, an empty list for none.
        pad_token_id: fills up `sequences`; None for the config's, else an eos token, else 0.
        stop_strings: texts that end a row, wherever their borders lie in its tokens. The token that
            completes one stays in the row; the row's text ends before it. Needs a tokenizer.
        num_return_sequences: rows to make of each prompt; they share its prefill.
        seed: of the draws. A list has one for each row that comes back; an int s stands for s,
            s + 1, s + 2, ... A row's draws depend on its own seed alone, not on its neighbours,
            its place or the device. None takes them from torch's global generator.
        return_logprobs: also return the log-probability of each new token, always that of the
            model's own distribution, before temperature, penalty and truncation.
        prefill_chunk: feed prompts in pieces of so many tokens a row, which bounds the memory that
            a long one takes; None feeds them whole.
        tokenizer: any object with `encode(text) -> ids` and `decode(ids) -> text`.

    Raises:
        ValueError: a value out of range, or an option that would have no effect.
        TypeError: a value of another type.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    stop_strings: str | Sequence[str] | None = None
    num_return_sequences: int = 1
    seed: int | Sequence[int] | None = None
    return_logprobs: bool = False
    prefill_chunk: int | None = None
    tokenizer: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, options: dict[str, Any]) -> Self:
        """From keyword arguments; TypeError for a name that is no option."""
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"unexpected keyword argument {name!r}: the options are {', '.join(names)}"
                )
        return cls(**options)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_return_sequences", "prefill_chunk"):
            if not (name == "prefill_chunk" and self.prefill_chunk is None):
                _whole(name, getattr(self, name), least=1)
        _whole("top_k", self.top_k, least=0, way_out=" (0 for no limit)")
        self._check_types()
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(
                f"repetition_penalty must be above 0 (1 for none), got {self.repetition_penalty}"
            )
        self._check_temperature()
        if self.stops and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer, which says what tokens read: give one")
        if "" in self.stops:
            raise ValueError("a stop string is empty, which would stop everything: leave it out")

    def _check_types(self) -> None:
        for name in ("do_sample", "return_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
        for name in ("eos_token_id", "pad_token_id", "seed"):
            value = getattr(self, name)
            given = value if isinstance(value, Sequence) and name != "pad_token_id" else [value]
            for number in () if value is None else given:
                if isinstance(number, bool) or not isinstance(number, Integral):
                    raise TypeError(f"{name} must be integers, got {number!r}")

    def _check_temperature(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.do_sample:
            if self.temperature == 0:
                raise ValueError(
                    "temperature 0 is the likeliest token every time: leave do_sample out for that"
                )
            return
        for name, default in SAMPLING_DEFAULTS.items():
            value = getattr(self, name)
            if value != default and not (name == "temperature" and value == 0):
                raise ValueError(f"{name}={value} has no effect without do_sample=True: add it")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if isinstance(self.stop_strings, str):
            return (self.stop_strings,)
        return tuple(self.stop_strings or ())

    def eos(self, config: NemotronV3Config) -> frozenset[int]:
        """The tokens that end a row.

        Raises:
            ValueError: a given one that no model of this vocabulary can draw.
        """
        ids = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        if ids is None:
            return frozenset()
        ids = frozenset([ids] if isinstance(ids, Integral) else ids)
        for token in ids if self.eos_token_id is not None else ():
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"eos_token_id {token} is outside the vocabulary of {config.vocab_size}, so "
                    "nothing would end a row: give a token of it, or [] for none"
                )
        return ids

    def pad(self, config: NemotronV3Config) -> int:
        """The token that fills up `sequences`."""
        for token in (self.pad_token_id, config.pad_token_id):
            if token is not None:
                return token
        return min(self.eos(config), default=0)

    def seeds(self, rows: int) -> list[int] | None:
        """One seed a row; None where there is none.

        Raises:
            ValueError: a list of another length.
        """
        if self.seed is None:
            return None
        if isinstance(self.seed, Integral):
            return [self.seed + row for row in range(rows)]
        if len(self.seed) != rows:
            raise ValueError(
                f"{len(self.seed)} seeds for {rows} rows (prompts times num_return_sequences): "
                "give one a row, or a single int"
            )
        return [int(seed) for seed in self.seed]


def _whole(name: str, value: int, least: int, way_out: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{way_out}, got {value}")
