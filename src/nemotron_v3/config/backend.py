"""Which implementation the layers use."""

from collections.abc import Mapping, Sequence, Set
from numbers import Number
from typing import Any, Self

from nemotron_v3.config import values
from nemotron_v3.config.foreign import INERT_BACKEND_FIELDS, check_fields
from nemotron_v3.config.spelling import (
    read_attributes,
    read_mapping,
    setting,
    settings_class,
    settings_of,
    settle,
)


@settings_class
class BackendConfig:
    """Which library computes attention, projections and norms, and which form of our ops runs.

    `te` is Transformer Engine; `impl` goes to every op of `nemotron_v3.ops`.

    `fake_balanced_gate` is for benchmarks: tokens are spread evenly over the experts, whatever the
    router's weights say, which are frozen then. Raises `ValueError` for a value that is not
    offered.
    """

    attn: str = setting("sdpa", values.choice("sdpa", "te", "flex"))
    linear: str = setting("torch", values.choice("torch", "te"))
    # AutoModel's "torch_fp32" names what our norms do in any case.
    rms_norm: str = setting("auto", values.choice("auto", "torch", "te", torch_fp32="torch"))
    impl: str = setting("auto", values.choice("auto", "reference", "portable", "triton"))
    fake_balanced_gate: bool = setting(False, values.flag)
    fake_gate_noise: float = setting(0.0, values.only(0.0))

    def __post_init__(self) -> None:
        settle(self)

    @classmethod
    def from_any(cls, source: Any = None, *parts: str) -> Self:
        """The typed form of `source`, which stays as it is.

        Args:
            source: `None` (defaults), ours, a mapping, or any object.
            *parts: of a foreign one, only what these parts of a model read; without them all.

        Raises:
            TypeError: a plain value, such as a layer's number in the place of a backend.
            ValueError: a choice that is not offered, or a field that nothing here reads (of a
                mapping, or of a dataclass where it is not at its default).
        """
        if source is None:
            return cls()
        if isinstance(source, cls):
            return source
        if isinstance(source, str | bytes | Number | Sequence | Set | type):
            raise TypeError(
                f"backend is {source!r}: give a BackendConfig, an object or mapping with its "
                "fields, or None"
            )
        settings = settings_of(cls)
        check_fields("backend", source, settings, INERT_BACKEND_FIELDS)
        if parts:
            wanted = {name for part in parts for name in READ_BY[part]}
            settings = {name: settings[name] for name in wanted}
        read = read_mapping if isinstance(source, Mapping) else read_attributes
        return cls(**read(settings, source))


READ_BY: dict[str, tuple[str, ...]] = {
    "block": ("rms_norm", "impl"),
    "attention": ("attn", "linear", "impl"),
    "mamba": ("linear", "impl"),
    "mlp": ("linear", "impl"),
    "moe": ("linear", "impl", "fake_balanced_gate", "fake_gate_noise"),
}
