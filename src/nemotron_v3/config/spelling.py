"""Settings and their names: which keys mean which field, and how they are read.

A field of a config is declared by :func:`setting`, which says in one place its default, its codec
and every key that a file may spell it with. The rest of this module reads mappings and foreign
objects by those declarations.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar, dataclass_transform

from nemotron_v3.config.values import Codec

T = TypeVar("T")

ROTARY_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"})

# Keys of released files, and of those transformers writes, that change nothing here.
INERT_KEYS = ROTARY_KEYS | {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "chunk_size_feed_forward",
    "expand",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "mamba_expand",
    "model_type",
    "name_or_path",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "return_dict",
    "time_step_rank",
    "transformers_version",
    "use_mamba_kernels",
}


@dataclass(frozen=True)
class Setting:
    """How a field is read and spelled."""

    codec: Codec[Any, Any]
    spellings: tuple[str, ...]  # other keys of the field; its name has precedence
    fresh: str | None  # the key that a new file uses, if it is not the field's name
    group: str  # a new file holds the field if the model has this part, or the field was changed
    yielding: tuple[str, ...]  # spellings that may contradict the field's name, and lose


def setting(
    default: Any,
    codec: Codec[Any, Any],
    *spellings: str,
    fresh: str | None = None,
    group: str = "",
    yielding: tuple[str, ...] = (),
    hashed: bool = True,
) -> Any:
    """A dataclass field with its default, codec and on-disk spellings (see :class:`Setting`)."""
    spelled = Setting(codec, spellings + yielding, fresh, group, yielding)
    return dataclasses.field(
        default=default, hash=None if hashed else False, metadata={"setting": spelled}
    )


def converted(*spellings: str, default: Any, converter: Codec[Any, Any], **options: Any) -> Any:
    """`setting`, of a field that the constructor takes in other types than it has.

    A type checker reads those types off `converter`, by this keyword (PEP 681).
    """
    return setting(default, converter, *spellings, **options)


def required(codec: Codec[Any, Any]) -> Any:
    """A dataclass field that has no default."""
    return setting(MISSING, codec)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(converted, required)
)
def settings_class(cls: type[T]) -> type[T]:
    """A frozen dataclass whose fields are settings."""
    return dataclass(frozen=True, kw_only=True)(cls)


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings of a config class by field name, in order."""
    return {
        field.name: field.metadata["setting"]
        for field in dataclasses.fields(cls)
        if "setting" in field.metadata
    }


def keys_of(name: str, spelled: Setting) -> tuple[str, ...]:
    """Every key of the field `name`, the most authoritative first."""
    return (name, *spelled.spellings)


def settle(config: Any) -> None:
    """Check every field of a config under construction, and give it its typed form."""
    for name, spelled in settings_of(type(config)).items():
        put(config, name, spelled.codec.read(name, getattr(config, name)))


def put(config: Any, name: str, value: Any) -> None:
    """Set a field of a config under construction, whose class is frozen for everybody else."""
    object.__setattr__(config, name, value)


def read_mapping(settings: Mapping[str, Setting], data: Mapping[str, Any]) -> dict[str, Any]:
    """Typed values by field name of the settings that stand in `data`, in whatever spelling.

    `None` means absent, except to an optional codec. Raises `ValueError` where two spellings of
    one field disagree.
    """
    values = {}
    for name, spelled in settings.items():
        found = {
            key: spelled.codec.read(key, data[key])
            for key in keys_of(name, spelled)
            if key in data and (data[key] is not None or spelled.codec.optional)
        }
        for key, value in found.items():
            first = next(iter(found))
            if value != found[first] and key not in spelled.yielding:
                raise ValueError(
                    f"{first} {data[first]!r} contradicts {key} {data[key]!r}: "
                    "they are two spellings of one setting, correct or delete one"
                )
            values[name] = found[first]
    return values


def read_attributes(settings: Mapping[str, Setting], source: object) -> dict[str, Any]:
    """Typed values by field name of the settings that an untyped object has as attributes.

    The first spelling that it has decides; `None` means absent, except to an optional codec.
    """
    values = {}
    for name, spelled in settings.items():
        for key in keys_of(name, spelled):
            value = attribute(source, key)
            if value is not MISSING and (value is not None or spelled.codec.optional):
                values[name] = spelled.codec.read(key, value)
                break
    return values


def attribute(source: object, key: str) -> Any:
    """An attribute of an untyped object, or `MISSING`.

    Mocks return a value for any attribute; for those only `__dict__` counts.
    """
    if getattr(source, "_a_name_that_no_config_has", None) is not None:
        return getattr(source, "__dict__", {}).get(key, MISSING)
    return getattr(source, key, MISSING)


def check_keys(settings: Mapping[str, Setting], data: Mapping[str, Any], also: set[str]) -> None:
    """Report unknown keys: raise for a likely typo, warn once for the rest.

    `also` are keys with a meaning that are not settings.
    """
    known = {key for name, spelled in settings.items() for key in keys_of(name, spelled)} | also
    unknown = [key for key in data if key not in known and key not in INERT_KEYS]
    for key in unknown:
        meant = next((name for name in sorted(known) if is_typing_error(key, name)), None)
        if meant is not None:
            raise ValueError(f"unknown key {key!r} (value {data[key]!r}): did you mean {meant!r}?")
    if unknown:
        _warn(f"config keys kept as they are, but nothing reads them: {', '.join(unknown)}")
    rotary = [key for key in data if key in ROTARY_KEYS]
    if rotary:
        _warn(
            f"{', '.join(rotary)} kept as they are, but no rotary embedding is applied: "
            "attention in these models has no positional encoding"
        )


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=5)  # the caller of from_json or from_dict


def closest(name: str, names: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of `names` that are most like `name`, the nearest first."""
    return difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)


def is_typing_error(typed: str, meant: str) -> bool:
    """Whether nothing but case, separators, or one letter (more, less, other, swapped) differs."""
    typed, meant = _letters(typed), _letters(meant)
    while typed and meant and typed[0] == meant[0]:
        typed, meant = typed[1:], meant[1:]
    while typed and meant and typed[-1] == meant[-1]:
        typed, meant = typed[:-1], meant[:-1]
    swapped = len(typed) == 2 and typed == meant[::-1]
    return swapped or max(len(typed), len(meant)) <= 1


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
