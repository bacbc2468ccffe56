"""The config of a whole model: typed, checked, and written back the way it was read."""

import dataclasses
import errno
import json
import math
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from nemotron_v3.config import values
from nemotron_v3.config.blocks import to_pattern
from nemotron_v3.config.checks import check
from nemotron_v3.config.files import MAX_CONFIG_BYTES, parse_object, read_bytes
from nemotron_v3.config.foreign import READ_BY, check_dropout
from nemotron_v3.config.presets import preset_values
from nemotron_v3.config.source import Source, Untyped, cut_text, mend_text, plain_json
from nemotron_v3.config.spelling import (
    MISSING,
    attribute,
    check_keys,
    closest,
    keys_of,
    put,
    read_attributes,
    read_mapping,
    setting,
    settings_of,
    settle,
)
from nemotron_v3.config.trainers import AskedByTrainers

ARCHITECTURE = "NemotronHForCausalLM"
MODEL_TYPE = "nemotron_h"
QUANTIZATION_CONFIG = "quantization_config"  # of a checkpoint's tensors, which reads it

_COUNT = values.whole(1)
_SIZE = values.whole(0)
_FRACTION = values.number(0.0, below=1.0)
_POSITIVE = values.positive()
_NOT_NEGATIVE = values.number(0.0)


class _View:
    """A field seen another way: a keyword of the constructor, computed when read."""

    def __init__(self, compute: Callable[["NemotronV3Config"], Any]) -> None:
        self.compute = compute

    def __get__(self, config: "NemotronV3Config | None", owner: type) -> Any:
        return None if config is None else self.compute(config)  # None: the constructor's default


@dataclass(frozen=True, kw_only=True)
class NemotronV3Config:
    """A Nemotron-H / Nemotron-3 hybrid, as its `config.json` describes it.

    Every value is checked at construction (`ValueError` with the value and the way out). A config
    does not change afterwards: :meth:`replace` gives another one. `layers_block_type` also takes
    a pattern string (`"MEM*-"`), a dtype field its name. Defaults are those of transformers'
    `NemotronHConfig`, except that a model has no experts unless they are told.
    """

    # Width and vocabulary
    vocab_size: int = setting(131072, _COUNT)
    hidden_size: int = setting(4096, _COUNT)
    tie_word_embeddings: bool = setting(False, values.flag)
    max_position_embeddings: int = setting(4096, _COUNT)

    # The blocks, in order: each is one of BLOCK_TYPES with its own norm and residual
    layers_block_type: tuple[str, ...] = setting(
        (), values.blocks, "layer_types", "hybrid_override_pattern", fresh="hybrid_override_pattern"
    )

    # Attention (no positional encoding of any kind)
    num_attention_heads: int = setting(32, _COUNT)
    num_key_value_heads: int = setting(8, values.optional(_COUNT))  # None: one per query head
    head_dim: int = setting(128, _COUNT, "attention_head_dim")
    attention_bias: bool = setting(False, values.flag)
    attention_dropout: float = setting(0.0, _FRACTION)
    sliding_window: int | None = setting(None, values.optional(values.only(None)))

    # Mamba-2
    mamba_num_heads: int = setting(128, _COUNT)
    mamba_head_dim: int = setting(64, _COUNT)
    ssm_state_size: int = setting(128, _COUNT)
    n_groups: int = setting(8, _COUNT, "mamba_n_groups")
    conv_kernel: int = setting(4, _COUNT, "mamba_d_conv")
    chunk_size: int = setting(128, _COUNT, "mamba_chunk_size")
    mamba_hidden_act: str = setting("silu", values.choice("silu", "swish"))  # one function
    use_conv_bias: bool = setting(True, values.flag, "mamba_conv_bias")
    # Every implementation obeys use_bias; files hold mamba_proj_bias beside it without effect.
    use_bias: bool = setting(False, values.flag, yielding=("mamba_proj_bias",))
    time_step_min: float = setting(0.001, _POSITIVE, "mamba_dt_min")
    time_step_max: float = setting(0.1, _POSITIVE, "mamba_dt_max")
    time_step_floor: float = setting(1e-4, _POSITIVE, "mamba_dt_init_floor")
    time_step_limit: tuple[float, float] = setting(
        (0.0, math.inf), values.limit, "mamba_dt_limit", group="if changed"
    )
    mamba_ssm_cache_dtype: torch.dtype = setting(torch.float32, values.dtype)

    # MLP: down(relu(up(x))^2)
    intermediate_size: int = setting(21504, _COUNT)
    mlp_hidden_act: str = setting("relu2", values.choice("relu2"))
    mlp_bias: bool = setting(False, values.flag)

    # Mixture of experts; n_routed_experts 0 means there is none
    n_routed_experts: int = setting(0, _SIZE, "num_local_experts", group="moe")
    n_shared_experts: int = setting(1, _SIZE, group="moe")
    num_experts_per_tok: int = setting(2, _COUNT, group="moe")
    moe_intermediate_size: int = setting(0, _SIZE, group="moe")
    moe_shared_expert_intermediate_size: int = setting(0, _SIZE, group="moe")
    moe_latent_size: int | None = setting(None, values.optional(_COUNT), group="moe")
    moe_shared_expert_overlap: bool = setting(True, values.flag, group="moe")
    n_group: int = setting(1, _COUNT, group="moe")
    topk_group: int = setting(1, _COUNT, group="moe")
    norm_topk_prob: bool = setting(True, values.flag, group="moe")
    routed_scaling_factor: float = setting(1.0, values.number(), group="moe")

    # Multi-token prediction; num_nextn_predict_layers 0 means there is none
    num_nextn_predict_layers: int = setting(0, _SIZE, group="mtp")
    mtp_layers_block_type: tuple[str, ...] = setting(
        ("attention", "moe"),
        values.blocks,
        "mtp_hybrid_override_pattern",
        fresh="mtp_hybrid_override_pattern",
        group="mtp",
    )

    # Norms, residual stream, initialisation
    layer_norm_epsilon: float = setting(1e-5, _NOT_NEGATIVE, "norm_eps", "rms_norm_eps")
    residual_in_fp32: bool = setting(False, values.flag)
    rescale_prenorm_residual: bool = setting(True, values.flag)
    initializer_range: float = setting(0.02, _NOT_NEGATIVE)
    hidden_dropout: float = setting(0.0, values.only(0.0))  # which no implementation applies

    # Generation and storage
    pad_token_id: int | None = setting(0, values.token_id)
    bos_token_id: int | None = setting(1, values.token_id)
    eos_token_id: int | list[int] | None = setting(2, values.token_ids, hashed=False)
    use_cache: bool = setting(True, values.flag)
    num_logits_to_keep: int = setting(1, _SIZE)
    dtype: torch.dtype | None = setting(
        None, values.optional(values.dtype), "torch_dtype", group="if changed"
    )

    # Other ways to tell, and to ask for, the blocks
    hybrid_override_pattern: InitVar[str | None] = _View(lambda c: to_pattern(c.layers_block_type))
    num_hidden_layers: InitVar[int | None] = _View(lambda c: c._count_layers())

    _origin: Source | Untyped | None = field(default=None, repr=False, compare=False)

    def __post_init__(
        self, hybrid_override_pattern: str | None, num_hidden_layers: int | None
    ) -> None:
        settle(self)
        if hybrid_override_pattern is not None:
            self._take_pattern(hybrid_override_pattern)
        if self.num_key_value_heads is None:
            put(self, "num_key_value_heads", self.num_attention_heads)
        told = values.optional(_SIZE).read("num_hidden_layers", num_hidden_layers)
        untyped = isinstance(self._origin, Untyped)
        if untyped and told is not None:
            put(self, "_origin", dataclasses.replace(self._origin, num_hidden_layers=told))
        check(self, None if untyped and self._origin.of_a_part else told, untyped)

    def _take_pattern(self, pattern: str) -> None:
        blocks = values.blocks.read("hybrid_override_pattern", pattern)
        if self.layers_block_type and self.layers_block_type != blocks:
            raise ValueError(
                f"hybrid_override_pattern {pattern!r} contradicts layers_block_type "
                f"{to_pattern(self.layers_block_type)!r}: give one of them"
            )
        put(self, "layers_block_type", blocks)

    def _count_layers(self) -> int:
        origin, blocks = self._origin, self.layers_block_type
        if isinstance(origin, Untyped) and (origin.of_a_part or not blocks):
            return len(blocks) if origin.num_hidden_layers is None else origin.num_hidden_layers
        return len(blocks)

    # ------------------------------------------------------------------------------ derived sizes

    @property
    def mamba_intermediate_size(self) -> int:
        """Inner width of a mamba block: heads times head width."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.mamba_intermediate_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_size(self) -> int:
        """Width of a mamba block's input projection: z, then x B C, then dt."""
        return self.mamba_intermediate_size + self.conv_dim + self.mamba_num_heads

    @property
    def mtp_hybrid_override_pattern(self) -> str:
        """`mtp_layers_block_type` as pattern letters."""
        return to_pattern(self.mtp_layers_block_type)

    @property
    def has_experts(self) -> bool:
        """Whether any block, a multi-token prediction block included, is a mixture of experts."""
        mtp = self.mtp_layers_block_type if self.num_nextn_predict_layers else ()
        return "moe" in self.layers_block_type or "moe" in mtp

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
        told = read_attributes(settings, source)
        return cls(**told, num_hidden_layers=depth, _origin=Untyped(of_a_part=bool(parts)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The config that a mapping with the keys of a `config.json` describes."""
        return cls._from_source(Source(plain_json(data)))

    @classmethod
    def from_json(cls, path: str | os.PathLike) -> Self:
        """The config in a JSON file, or in the `config.json` of a directory.

        Raises `FileNotFoundError`, or `ValueError` with the file's name: no config, more than
        1 MiB, or no regular file.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            raw = read_bytes(path, MAX_CONFIG_BYTES)
            return cls._from_source(Source(parse_object(raw, str(path)), raw.decode()))
        except (ValueError, RecursionError) as error:
            told = "" if str(error).startswith(str(path)) else f"{path}: "
            raise ValueError(f"{told}{error}") from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The config of a released model (one of `PRESETS`), with `changes` to its fields."""
        return cls(**preset_values(name) | changes)

    @classmethod
    def _from_source(cls, source: Source) -> Self:
        told = source.data.get("model_type", MODEL_TYPE)
        if told != MODEL_TYPE:
            raise ValueError(f"model_type is {told!r}: only {MODEL_TYPE!r} models are read here")
        check_dropout(source.data)
        check_keys(settings_of(cls), source.data, also={"num_hidden_layers", QUANTIZATION_CONFIG})
        return cls._parsed(source)

    @classmethod
    def _parsed(cls, source: Source) -> Self:
        told = read_mapping(settings_of(cls), source.data)
        return cls(**told, num_hidden_layers=source.data.get("num_hidden_layers"), _origin=source)

    # Else a trainer gets as far as setting `use_cache` of a frozen config, or further.
    get_text_config = AskedByTrainers()
    _name_or_path = AskedByTrainers()
    num_labels = AskedByTrainers()

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

    def of_wide_weights(self) -> Self:
        """This config without what its file says of weights in 8 or 4 bits."""
        source = self._origin
        if not isinstance(source, Source) or QUANTIZATION_CONFIG not in source.data:
            return self
        data = {key: value for key, value in source.data.items() if key != QUANTIZATION_CONFIG}
        text = None if source.text is None else cut_text(source.text, QUANTIZATION_CONFIG)
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**fields | {"_origin": Source(data, text)})

    def to_dict(self) -> dict[str, Any]:
        """The content of this config's `config.json`.

        One that was read keeps the keys, order, spelling and values of its source, apart from
        fields changed since; a new one has the keys of a released file.
        """
        if isinstance(self._origin, Source):
            return plain_json(self._origin.data | self._changes(self._origin))
        return plain_json(self._fresh())

    def to_json(self, path: str | os.PathLike) -> None:
        """Write `config.json` to `path` (a file, or a directory that gets one).

        The file appears whole or not at all: what was there stays until the new one is complete.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "make this directory first", str(path.parent))
        scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            scratch.write_bytes(self._to_text().encode())
            scratch.replace(path)
        finally:
            scratch.unlink(missing_ok=True)

    def _to_text(self) -> str:
        if isinstance(self._origin, Source) and self._origin.text is not None:
            return mend_text(self._origin.text, self._changes(self._origin))
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def _changes(self, source: Source) -> dict[str, Any]:
        """What this config says unlike its source, by key and in the source's spelling."""
        before = self._parsed(source)
        changes = {}
        for name, spelled in settings_of(type(self)).items():
            value = getattr(self, name)
            if value == getattr(before, name):
                continue
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
            "architectures": [ARCHITECTURE],
            "model_type": MODEL_TYPE,
            "num_hidden_layers": self.num_hidden_layers,
        }
        for name, spelled in settings_of(type(self)).items():
            value = getattr(self, name)
            default = type(self).__dataclass_fields__[name].default
            if parts.get(spelled.group, False) or value != default:
                key = spelled.fresh or name
                data[key] = spelled.codec.write(value, None, key)
        return dict(sorted(data.items()))
