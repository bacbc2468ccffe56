"""Which implementation the layers use."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Number
from typing import Any, Self

from nemotron_v3.config import values
from nemotron_v3.config.spelling import (
    attribute,
    read_attributes,
    read_mapping,
    setting,
    settings_of,
    settle,
)


@dataclass(frozen=True, kw_only=True)
class BackendConfig:
    """Who computes attention, projections and norms, and which form of our ops runs.

    `te` is Transformer Engine; `impl` goes to every op of `nemotron_v3.ops`. Raises
    `ValueError` for a value that is not offered.
    """

    attn: str = setting("sdpa", values.choice("sdpa", "te", "flex"))
    linear: str = setting("torch", values.choice("torch", "te"))
    # AutoModel's "torch_fp32" names what our norms do in any case.
    rms_norm: str = setting("auto", values.choice("auto", "torch", "te", torch_fp32="torch"))
    impl: str = setting("auto", values.choice("auto", "reference", "portable", "triton"))

    def __post_init__(self) -> None:
        settle(self)

    @classmethod
    def from_any(cls, source: Any = None) -> Self:
        """The typed form of `source`: `None` (defaults), ours, a mapping, or any object.

        What else a foreign object holds is not looked at, and it stays as it is. One exception: a
        request for `fake_balanced_gate` raises, since the model would silently route for real.

        Raises:
            TypeError: a plain value, such as a layer's number in the place of a backend.
            ValueError: a choice that is not offered.
        """
        if source is None:
            return cls()
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            return cls(**read_mapping(settings_of(cls), source))
        if isinstance(source, str | bytes | Number | Sequence | Set | type):
            raise TypeError(
                f"backend is {source!r}: give a BackendConfig, an object or mapping with its "
                "fields, or None"
            )
        if attribute(source, "fake_balanced_gate") is True:
            raise ValueError("fake_balanced_gate is True, which is not offered: set it to False")
        return cls(**read_attributes(settings_of(cls), source))
