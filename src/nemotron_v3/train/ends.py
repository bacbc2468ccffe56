"""Which tokens begin, end and fill up the texts of the model that a run trains.

The tokenizer says so for a fresh model, and for a checkpoint whose tokenizer is exchanged, unless
the recipe says otherwise; a checkpoint with its own tokenizer keeps what it says. What does not
fit together is told at the start.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemotron_v3.checkpoint.side_files import (
    GENERATION_CONFIG,
    MAX_GENERATION_CONFIG_BYTES,
    read_generation_config,
)
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.files import exists, read_bytes
from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.pretrained import MAX_BYTES, PretrainedTokenizer
from nemotron_v3.data.tokenizer import FILE, Tokenizer
from nemotron_v3.data.turns import kinds_in, untaught_end
from nemotron_v3.train.options import TrainOptions

NAMES = {f"{name}_id": name for name in ("bos_token", "eos_token", "pad_token")}


@dataclass(frozen=True)
class Ends:
    """What a run's model is told of its tokenizer.

    Attributes:
        config: changes to the fields of its config.
        generation_config: its generation config, None for none.
        warnings: what does not fit together, each with the way out.
    """

    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    warnings: tuple[str, ...] = ()


def settle_ends(
    options: TrainOptions, config: NemotronV3Config, tokenizer: PretrainedTokenizer | Tokenizer
) -> Ends:
    """The tokens of a run's model.

    Args:
        options: of the run, with the chat template that it takes.
        config: of the model as it is read or drawn.
        tokenizer: of the run.

    Raises:
        ValueError: the recipe names tokens that a fresh model does not have.
    """
    asked = options.model
    named = {
        field: tokenizer.backend.token_to_id(tokenizer.special_tokens[name])
        for field, name in NAMES.items()
        if name in tokenizer.special_tokens
    }
    named = {field: number for field, number in named.items() if number is not None}
    changes: dict[str, Any] = {}
    if asked.path is None:
        _check_recipe(config, asked.config)
        unknown = {} if asked.preset else dict.fromkeys(NAMES)
        changes = {n: v for n, v in (unknown | named).items() if n not in asked.config}
    elif asked.tokenizer is not None:
        changes = {n: v for n, v in named.items() if v not in _listed(getattr(config, n))}
    said = _generation_config(asked.path or asked.tokenizer)
    if said is not None and (asked.path is None or asked.tokenizer is not None):
        told = named | {n: v for n, v in asked.config.items() if n in NAMES}
        said |= {
            name: value
            for name, value in told.items()
            if said.get(name) is not None and not set(_listed(value)) <= set(_listed(said[name]))
        }
    stops = (said or {}).get("eos_token_id")
    stops = changes.get("eos_token_id", config.eos_token_id) if stops is None else stops
    ends = frozenset(_listed(stops))
    return Ends(changes, said, tuple(_warnings(options, config, tokenizer, ends)))


def _listed(tokens: Any) -> list[int]:
    if tokens is None:
        return []
    return list(tokens) if isinstance(tokens, list | tuple) else [tokens]


def _check_recipe(config: NemotronV3Config, asked: Mapping[str, Any]) -> None:
    for name in NAMES.keys() & asked.keys():
        for token in _listed(getattr(config, name)):
            if not 0 <= token < config.vocab_size:
                raise ValueError(
                    f"model.config.{name} is {token}, and the model has {config.vocab_size} "
                    "tokens: give one of them, or leave it out to have the tokenizer's"
                )


def _generation_config(folder: Path | None) -> dict[str, Any] | None:
    """That of a checkpoint, or of the folder that a tokenizer is from."""
    if folder is None or not exists(folder / GENERATION_CONFIG):
        return None
    raw = read_bytes(folder / GENERATION_CONFIG, MAX_GENERATION_CONFIG_BYTES)
    return read_generation_config({GENERATION_CONFIG: raw}, folder)


def _warnings(
    options: TrainOptions,
    config: NemotronV3Config,
    tokenizer: PretrainedTokenizer | Tokenizer,
    ends: frozenset[int],
) -> list[str]:
    told = []
    outside = sorted(token for token in ends if not 0 <= token < config.vocab_size)
    if outside:
        told.append(
            f"the model is said to stop at token {outside[0]}, and has {config.vocab_size} tokens: "
            f"{_way_out(options, tokenizer.eos_token_id)}"
        )
    kinds, end = kinds_in(options.data.sources), tokenizer.eos_token_id
    if kinds.texts and end is not None and end not in ends:
        stops = ", ".join(f"{n} ({tokenizer.backend.id_to_token(n)!r})" for n in sorted(ends))
        told.append(
            f"texts end in the tokenizer's token {end} ({tokenizer.backend.id_to_token(end)!r}), "
            f"and the model stops at {stops or 'none'}: it does not stop where it learns to. "
            f"{_way_out(options, end)}"
        )
    if kinds.texts and not tokenizer.frame()[1]:
        told.append(
            "nothing ends a text, for the tokenizer names no eos_token: the model does not learn "
            "to stop. Name one in its tokenizer_config.json"
        )
    if kinds.chat is not None and options.data.chat_template is not None:
        encoder = Encoder.of(tokenizer, options.data.chat_template, options.data.train_on)
        problem = untaught_end(encoder, kinds.chat, ends)
        told += [] if problem is None else [problem]
    if options.lora.rank and _is_exchanged(options):
        told.append(
            f"an adapter is used with its base's tokenizer, and that of {options.model.tokenizer} "
            f"is another than that of {options.model.path}: put it into the base's folder"
        )
    return told


def _way_out(options: TrainOptions, end: int | None) -> str:
    if end is None:
        return "give the token that ends a text (eos_token_id)"
    if options.model.path is None:
        return f"Give model.config.eos_token_id = {end}, or leave it out"
    place = options.model.path / "generation_config.json"
    return f'Write {{"eos_token_id": {end}}} into {place}, or correct its tokenizer_config.json'


def _is_exchanged(options: TrainOptions) -> bool:
    """Whether a checkpoint is trained with another tokenizer than its own."""
    told, path = options.model.tokenizer, options.model.path
    if told is None or path is None or not exists(path / FILE):
        return False
    return read_bytes(told / FILE, MAX_BYTES) != read_bytes(path / FILE, MAX_BYTES)
