"""The config of a whole model: typed, checked, and written back the way it was read."""

import dataclasses
import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, ClassVar, Self

from nemotron_v3.config import values
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.blocks import to_pattern
from nemotron_v3.config.checks import check, with_sizes
from nemotron_v3.config.files import MAX_CONFIG_BYTES, parse_object, read_bytes
from nemotron_v3.config.foreign import READ_BY, check_dropout
from nemotron_v3.config.meaning import MEANINGS, check_meanings
from nemotron_v3.config.missing import CONFIG, no_config
from nemotron_v3.config.presets import preset_values
from nemotron_v3.config.puzzle import mlp_widths, of_mlp_widths
from nemotron_v3.config.settings import ModelSettings
from nemotron_v3.config.source import (
    Source,
    Untyped,
    cut_text,
    of_text_model,
    patch_json_text,
    plain_json,
)
from nemotron_v3.config.spelling import (
    MISSING,
    attribute,
    check_keys,
    closest,
    keys_of,
    put,
    read_attributes,
    read_mapping,
    settings_class,
    settings_of,
    settle,
)
from nemotron_v3.config.trainers import AskedByTrainers

ARCHITECTURE = "NemotronHForCausalLM"
PUZZLE_ARCHITECTURE = "NemotronHPuzzleForCausalLM"
MODEL_TYPE = "nemotron_h"
PUZZLE = "nemotron_h_puzzle"  # blocks with sizes of their own
QUANTIZATION_CONFIG = "quantization_config"  # `checkpoint` reads it


@settings_class
class NemotronV3Config(ModelSettings):
    """A Nemotron-H / Nemotron-3 hybrid, as its `config.json` describes it.

    Every value is checked at construction (`ValueError` with the value and the way out). A config
    does not change afterwards: :meth:`replace` gives another one. `layers_block_type` also takes
    a pattern string (`"MEM*-"`), a dtype field its name. Defaults are those of transformers'
    `NemotronHConfig`, except that a model has no experts unless they are given.
    """

    _origin: Source | Untyped | None = field(default=None, repr=False, compare=False)

    def __post_init__(
        self, hybrid_override_pattern: str | None, num_hidden_layers: int | None
    ) -> None:
        settle(self)
        if hybrid_override_pattern is not None:
            self._take_pattern(hybrid_override_pattern)
        if self.block_configs and not self.layers_block_type:
            put(self, "layers_block_type", tuple(b.block_type for b in self.block_configs))
        if self.num_key_value_heads is None:
            put(self, "num_key_value_heads", self.num_attention_heads)
        depth = values.optional(values.whole(0)).read("num_hidden_layers", num_hidden_layers)
        origin = self._origin
        if isinstance(origin, Untyped):
            if depth is not None:
                put(self, "_origin", dataclasses.replace(origin, num_hidden_layers=depth))
            check(self, None if origin.of_a_part else depth, untyped=True)
        else:
            check(self, depth, untyped=False)

    def _take_pattern(self, pattern: str) -> None:
        blocks = values.blocks.read("hybrid_override_pattern", pattern)
        if self.layers_block_type and self.layers_block_type != blocks:
            raise ValueError(
                f"hybrid_override_pattern {pattern!r} contradicts layers_block_type "
                f"{to_pattern(self.layers_block_type)!r}: give one of them"
            )
        put(self, "layers_block_type", blocks)

    @property
    def hybrid_override_pattern(self) -> str:
        """`layers_block_type` as pattern letters, such as `"MEM*-"`."""
        return to_pattern(self.layers_block_type)

    @property
    def num_hidden_layers(self) -> int:
        """The number of blocks; of a foreign object that names none, what it announced."""
        origin, blocks = self._origin, self.layers_block_type
        if isinstance(origin, Untyped) and (origin.of_a_part or not blocks):
            return len(blocks) if origin.num_hidden_layers is None else origin.num_hidden_layers
        return len(blocks)

    # ------------------------------------------------------------------------------------ reading

    @classmethod
    def from_any(cls, source: Any, *parts: str) -> Self:
        """The typed config of `source`, which stays as it is.

        Args:
            source: a config of this class (returned itself), a mapping with the keys of a
                `config.json`, transformers' `NemotronHConfig`, or any object with those attributes:
                what such an object lacks gets its default here, and here alone.
            *parts: of such an object, only what these parts of a model read (`foreign.READ_BY`),
                and the number of layers that it announces; without them a whole model.

        Raises:
            TypeError: what is no config.
            ValueError: a value that is not offered, or a contradiction.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls.from_dict(source)
        if source is None or isinstance(source, str | bytes | Path | type):
            raise TypeError(
                f"cannot read a config from {source!r}: give a NemotronV3Config, a mapping or an "
                "object with its attributes (from_json reads a file, preset a released model)"
            )
        depth = attribute(source, "num_hidden_layers")
        depth = None if depth is MISSING else depth
        settings = settings_of(cls)
        if parts:
            wanted = {name for part in parts for name in READ_BY[part]}
            wanted |= {"layers_block_type"} if depth is None else set()
            settings = {name: settings[name] for name in wanted}
        if "hidden_dropout" in settings:
            check_dropout(source)
        values_read = read_attributes(settings, source)
        return cls(**values_read, num_hidden_layers=depth, _origin=Untyped(of_a_part=bool(parts)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that a mapping with the keys of a `config.json` describes."""
        return cls._from_source(Source(plain_json(data)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """The config in a JSON file, or in the `config.json` of a directory.

        Raises `FileNotFoundError`, or `ValueError` with the file's name: no config, more than
        16 MiB, or no regular file.
        """
        path = Path(path)
        if path.is_dir():
            if not (path / CONFIG).exists():
                raise FileNotFoundError(no_config(path))
            path = path / CONFIG
        try:
            raw = read_bytes(path, MAX_CONFIG_BYTES)
            return cls._from_source(Source(parse_object(raw, str(path)), raw.decode()))
        except (ValueError, RecursionError) as error:
            place = "" if str(error).startswith(str(path)) else f"{path}: "
            raise ValueError(f"{place}{error}") from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The config of a released model (one of `PRESETS`), with `changes` to its fields."""
        return cls(**preset_values(name) | changes)

    @classmethod
    def _from_source(cls, source: Source) -> Self:
        source = of_text_model(source)
        model_type = source.data.get("model_type", MODEL_TYPE)
        if model_type not in (MODEL_TYPE, PUZZLE):
            raise ValueError(
                f"model_type is {model_type!r}: only {MODEL_TYPE!r} and {PUZZLE!r} models "
                "are read here"
            )
        check_dropout(source.data)
        check_meanings(source.data)
        also = {"num_hidden_layers", "mtp_n_routed_experts", QUANTIZATION_CONFIG, *MEANINGS}
        check_keys(settings_of(cls), source.data, also=also)
        return cls._parsed(source)

    @classmethod
    def _parsed(cls, source: Source) -> Self:
        data = dict(source.data)
        widths = data.pop("intermediate_size") if _has_mlp_widths(data) else None
        settings = read_mapping(settings_of(cls), data)
        if widths is not None:
            if settings.get("block_configs"):
                raise ValueError("intermediate_size is a list beside block_configs: give one")
            blocks = settings.get("layers_block_type", ())
            settings["block_configs"] = of_mlp_widths(blocks, widths)
        for entry in settings.get("mtp_block_configs", ()):
            for name, value in entry.sizes:  # the model's value too, if it has none
                if source.data.get(name) is None:
                    settings[name] = value
        return cls(
            **settings, num_hidden_layers=source.data.get("num_hidden_layers"), _origin=source
        )

    # Else a trainer gets as far as setting `use_cache` of a frozen config, or further.
    get_text_config: ClassVar[AskedByTrainers] = AskedByTrainers()
    _name_or_path: ClassVar[AskedByTrainers] = AskedByTrainers()
    num_labels: ClassVar[AskedByTrainers] = AskedByTrainers()

    # ------------------------------------------------------------------------- changing and writing

    def replace(self, **changes: Any) -> Self:
        """This config with some fields changed; it keeps the spelling of the file it came from."""
        known = [*settings_of(type(self)), "hybrid_override_pattern", "num_hidden_layers"]
        for name in changes:
            if name not in known:
                nearest = " or ".join(closest(name, known)) or "a field of NemotronV3Config"
                raise TypeError(f"no field {name!r} to replace: did you mean {nearest}?")
        if "hybrid_override_pattern" in changes:
            changes.setdefault("layers_block_type", ())
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**fields | changes)

    def of_block(self, index: int) -> Self:
        """The config of one block: this one, with the sizes that are the block's own for all."""
        return with_sizes(self, self.block_configs[index]) if self.block_configs else self

    def of_mtp_block(self, index: int) -> Self:
        """The same, of a block of multi-token prediction."""
        own = self.mtp_block_configs
        return with_sizes(self, own[index]) if own else self

    def of_layers(self, layers: Sequence[int]) -> Self:
        """The config of a model of some of the blocks, in their order."""
        changes: dict[str, Any] = {"layers_block_type": [self.layers_block_type[i] for i in layers]}
        if self.block_configs:
            changes["block_configs"] = tuple(self.block_configs[i] for i in layers)
        return self.replace(**changes)

    def of_wide_weights(self) -> Self:
        """This config without what its file says of weights in 8 or 4 bits."""
        source = self._origin
        if not isinstance(source, Source) or QUANTIZATION_CONFIG not in source.data:
            return self
        data = {key: value for key, value in source.data.items() if key != QUANTIZATION_CONFIG}
        text = None if source.text is None else cut_text(source.text, QUANTIZATION_CONFIG)
        fields: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["_origin"] = Source(data, text)
        return type(self)(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The content of this config's `config.json`.

        One that was read keeps the keys, order, spelling and values of its source, apart from
        fields changed since; a new one has the keys of a released file.
        """
        if isinstance(self._origin, Source):
            return plain_json(self._origin.data | self._changes(self._origin))
        return plain_json(self._fresh())

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json` to `path` (a file, or a directory that gets one).

        The file appears whole or not at all: what was there stays until the new one is complete.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "make this directory first", str(path.parent))
        with atomic_file(path) as temporary:
            temporary.write_bytes(self._to_text().encode())

    def _to_text(self) -> str:
        if isinstance(self._origin, Source) and self._origin.text is not None:
            return patch_json_text(self._origin.text, self._changes(self._origin))
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def _changes(self, source: Source) -> dict[str, Any]:
        """What this config says unlike its source, by key and in the source's spelling."""
        before = self._parsed(source)
        changes = {}
        for name, spelled in settings_of(type(self)).items():
            value = getattr(self, name)
            if value == getattr(before, name):
                continue
            if name == "block_configs" and _has_mlp_widths(source.data):
                widths = mlp_widths(self.block_configs, self.intermediate_size)
                if widths is not None:
                    changes["intermediate_size"] = widths
                    continue
                changes["intermediate_size"] = self.intermediate_size
            standing = [key for key in keys_of(name, spelled) if key in source.data]
            for key in standing or [spelled.fresh or name]:
                changes[key] = spelled.codec.write(value, source.data.get(key), key)
        if source.data.get("num_hidden_layers") not in (None, self.num_hidden_layers):
            changes["num_hidden_layers"] = self.num_hidden_layers
        return changes

    def _fresh(self) -> dict[str, Any]:
        """The keys and values of a new file, in the order of the released ones."""
        parts = {"": True, "moe": self.has_experts, "mtp": self.num_nextn_predict_layers > 0}
        data = {
            "architectures": [PUZZLE_ARCHITECTURE if self.block_configs else ARCHITECTURE],
            "model_type": PUZZLE if self.block_configs else MODEL_TYPE,
            "num_hidden_layers": self.num_hidden_layers,
        }
        for name, spelled in settings_of(type(self)).items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            if parts.get(spelled.group, False) or value != default:
                key = spelled.fresh or name
                data[key] = spelled.codec.write(value, None, key)
        return dict(sorted(data.items()))


def _has_mlp_widths(data: Mapping[str, Any]) -> bool:
    return isinstance(data.get("intermediate_size"), list)
