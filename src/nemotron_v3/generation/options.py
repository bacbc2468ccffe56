"""How to generate: every option in one place, checked before anything runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Self

from nemotron_v3.config import NemotronV3Config
from nemotron_v3.generation.generation_config import SAMPLING, settings_of

MAX_NEW_TOKENS = 128
SAMPLING_DEFAULTS: dict[str, float] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
# Of seeds, as torch's generators take them.
LEAST_SEED, MOST_SEED = -(2**63), 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """What `generate` and `stream` take beside the prompts.

    An option that the caller does not give is the one of the model's `generation_config`, else the
    default here.

    Attributes:
        max_new_tokens: most tokens a row gets; None for what `max_length` leaves, else 128.
        max_length: most tokens of the row with the longest prompt, which is counted; in place of
            `max_new_tokens`.
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: divides the logits before drawing; 1 draws as the model predicts.
        top_k: draw from the so many likeliest tokens; 0 for all.
        top_p: then from the fewest of these that together have this probability; 1 for all.
        min_p: then from those at least this times as likely as the likeliest; 0 for all.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens that
            the row holds already, its prompt included (Keskar et al. 2019); 1 for none.
        eos_token_id: tokens that end a row; None for those of the model's `generation_config`,
            else its config's; an empty list for none.
        pad_token_id: fills up `sequences`; None for the same two's, else an eos token, else 0.
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
        graph: `"auto"` runs each step on a GPU as one CUDA graph, where it can (`report` says why
            not); False calls `forward`.

    Raises:
        ValueError: a value out of range, or an option that would have no effect.
        TypeError: a value of another type.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
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
    graph: str | bool = "auto"

    @classmethod
    def of(
        cls, options: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> Self:
        """From keyword arguments, and what a model's generation config says beside them.

        Raises:
            TypeError: a name that is no option; and what the class raises.
            ValueError: a generation config that cannot be obeyed; and what the class raises.
        """
        names = [f.name for f in fields(cls)]
        for name in options:
            if name not in names:
                raise TypeError(
                    f"unexpected keyword argument {name!r}: the options are {', '.join(names)}"
                )
        options = {n: v for n, v in options.items() if v is not None or n not in _MAY_BE_NONE}
        return cls(**_beside(settings_of(generation_config), options) | options)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_length", "num_return_sequences", "prefill_chunk"):
            if not (name in _MAY_BE_NONE and getattr(self, name) is None):
                _whole(name, getattr(self, name), least=1)
        if self.max_new_tokens is not None and self.max_length is not None:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} and max_length={self.max_length} say the "
                "same in two ways: give one"
            )
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
        if self.graph is not False and self.graph != "auto":
            raise ValueError(f"graph must be 'auto' or False, got {self.graph!r}")
        for name in ("do_sample", "return_logprobs"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if isinstance(value, Integral) and abs(value) >= 2**62:
                raise ValueError(f"{name} {value} is more than a computer counts: give a float")
        for name in ("eos_token_id", "pad_token_id", "seed"):
            value = getattr(self, name)
            given = value if isinstance(value, Sequence) and name != "pad_token_id" else [value]
            for number in () if value is None else given:
                if isinstance(number, bool) or not isinstance(number, Integral):
                    raise TypeError(f"{name} must be integers, got {number!r}")
        for text in self.stops:
            if not isinstance(text, str):
                raise TypeError(f"stop_strings must be texts, got {text!r}")
        for number in self._given_seeds:
            _check_seed(number)
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < 2**63:
            raise ValueError(f"pad_token_id {self.pad_token_id} is no token")

    def _check_temperature(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.do_sample:
            if self.temperature == 0:
                raise ValueError(
                    "temperature 0 is the likeliest token every time: leave do_sample out for that"
                )
            return
        if self.seed is not None:
            raise ValueError(f"seed={self.seed} has no effect without do_sample=True: add it")
        for name, default in SAMPLING_DEFAULTS.items():
            value = getattr(self, name)
            if value != default and not (name == "temperature" and value == 0):
                raise ValueError(f"{name}={value} has no effect without do_sample=True: add it")

    def fitted(self, longest: int) -> Self:
        """The same with `max_new_tokens`, for prompts of which the longest has so many tokens.

        Raises:
            ValueError: `max_length` leaves no token.
        """
        if self.max_new_tokens is not None:
            return self
        if self.max_length is None:
            return replace(self, max_new_tokens=MAX_NEW_TOKENS)
        if self.max_length <= longest:
            raise ValueError(
                f"max_length {self.max_length} leaves nothing behind a prompt of {longest} tokens: "
                "raise it, or give max_new_tokens"
            )
        return replace(self, max_new_tokens=self.max_length - longest, max_length=None)

    @property
    def limit(self) -> int:
        """The most new tokens of a row, of options that are `fitted`."""
        assert self.max_new_tokens is not None
        return self.max_new_tokens

    @property
    def _given_seeds(self) -> Sequence[int]:
        if self.seed is None:
            return ()
        return [int(self.seed)] if isinstance(self.seed, int | Integral) else self.seed

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if isinstance(self.stop_strings, str):
            return (self.stop_strings,)
        if self.stop_strings is not None and not isinstance(self.stop_strings, Iterable):
            raise TypeError(f"stop_strings must be texts, got {self.stop_strings!r}")
        return tuple(self.stop_strings or ())

    def eos(self, config: NemotronV3Config) -> frozenset[int]:
        """The tokens that end a row.

        Raises:
            ValueError: a given one that no model of this vocabulary can draw.
        """
        ids = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        if ids is None:
            return frozenset()
        ids = frozenset([int(ids)] if isinstance(ids, int | Integral) else ids)
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
        if isinstance(self.seed, int | Integral):
            _check_seed(int(self.seed) + rows - 1)
            return [int(self.seed) + row for row in range(rows)]
        if len(self.seed) != rows:
            raise ValueError(
                f"{len(self.seed)} seeds for {rows} rows (prompts times num_return_sequences): "
                "give one a row, or a single int"
            )
        return [int(seed) for seed in self.seed]


_MAY_BE_NONE = frozenset(f.name for f in fields(GenerationOptions) if f.default is None)


def _beside(defaults: dict[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a generation config, `defaults`, that act beside the caller's `options`.

    Raises:
        ValueError: it says something that cannot be.
    """
    if defaults:
        draws = bool(defaults.get("do_sample"))
        alone = {n: v for n, v in defaults.items() if draws or n not in SAMPLING}
        if "max_new_tokens" in alone:
            alone.pop("max_length", None)
        try:
            GenerationOptions(**alone, tokenizer=options.get("tokenizer"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"in the model's generation_config, {error}") from error
    if options.get("temperature") == 0 and "do_sample" not in options:
        defaults["do_sample"] = False  # what temperature 0 means
    if not (options["do_sample"] if "do_sample" in options else defaults.get("do_sample")):
        defaults = {name: value for name, value in defaults.items() if name not in SAMPLING}
    if "max_new_tokens" in options or "max_length" in options:
        defaults = {n: v for n, v in defaults.items() if n not in ("max_new_tokens", "max_length")}
    elif "max_new_tokens" in defaults:
        defaults.pop("max_length", None)
    return defaults


def _check_seed(seed: int) -> None:
    if not LEAST_SEED <= seed <= MOST_SEED:
        raise ValueError(
            f"seed {seed} is outside the 64 bits of a generator, from {LEAST_SEED} to {MOST_SEED}"
        )


def _whole(name: str, value: int, least: int, way_out: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{way_out}, got {value}")
    if value >= 2**62:
        raise ValueError(f"{name} {value} is more than a computer counts: give a smaller one")
