"""What the JSON beside the weights says of their formats, compared with what the tensors are.

The tensors decide. A claim about a module that its tensors contradict is an error all the same,
since one of the two belongs to another file; a module that no claim names is what its tensors are.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import filter as matching
from typing import Any

from nemotron_v3.checkpoint.narrow.layouts import FP8, NVFP4, NVFP4_GROUP, Narrow

HF_QUANT_CONFIG = "hf_quant_config.json"
QUANTIZATION_CONFIG = "quantization_config"

_METHODS = ("modelopt", "modelopt_mixed", "modelopt_fp4", "compressed-tensors")
_ALGORITHMS = {
    "FP8": FP8,
    "FP8_PB_WO": FP8,
    "FP8_BLOCK_SCALES": FP8,
    "NVFP4": NVFP4,
    "W4A16_NVFP4": NVFP4,
    "MIXED_PRECISION": None,  # declared layer by layer
}
_FORMATS = ("nvfp4-pack-quantized", "float-quantized", "naive-quantized", "mixed-precision")
# Settings of compressed-tensors that change what a weight is.
_TRANSFORMS = ("sparsity_config", "transform_config")
_MOST_PATTERNS = 1000
# Regular expressions that are patterns in another spelling; others are not run, since one from
# outside can take any time.
_PLAIN_REGEX = re.compile(r"\^?(?:[\w-]|\\\.|\.\*|\.)*\$?")


@dataclass(frozen=True)
class Declared:
    """What is claimed: `algorithm` of all modules (None: of none in general), `layers` by name,
    `groups` with their layout and size, and `excluded` names and patterns."""

    where: str
    algorithm: str | None
    layers: Mapping[str, str]
    groups: tuple[tuple[str, int | None], ...]
    excluded: tuple[str, ...]

    def problems(self, narrow: Narrow, stored: Mapping[str, Any], outer: str = "") -> Iterator[str]:
        """Where the tensors, `narrow` and all of the `stored` names, contradict the claims, in
        which names begin with `outer`."""
        modules = {outer + n.removesuffix(".weight"): w for n, w in narrow.weights.items()}
        for module, claimed in self.layers.items():
            if module in modules and modules[module].layout != claimed:
                found = modules[module].description
                yield f"{module}.weight is {found}, {self.where} says {claimed}"
            elif module not in modules and f"{module.removeprefix(outer)}.weight" in stored:
                yield f"{module}.weight has no scales beside it, {self.where} says {claimed}"
        offered = {layout for layout, _ in self.groups}
        offered |= set() if self.algorithm is None else {self.algorithm}
        for module, weight in modules.items():
            if offered and module not in self.layers and weight.layout not in offered:
                layouts = " and ".join(sorted(offered))
                yield f"{weight.name} is {weight.description}, {self.where} says {layouts}"
        for layout, size in self.groups:
            if layout == NVFP4 and size not in (None, NVFP4_GROUP):
                for weight in narrow.weights.values():
                    if weight.layout == layout:
                        said = f"{self.where} says groups of {size}"
                        yield f"{weight.name} is {weight.description}, {said}"
        for module in _matching(modules, self.excluded):
            weight = modules[module]
            yield f"{weight.name} is {weight.description}, {self.where} excludes {module}"
        if (offered or self.layers) and not modules:
            yield f"no tensor has scales beside it, {self.where} says that weights are quantised"


def read_declared(config: Mapping[str, Any], beside: Mapping[str, Any] | None) -> list[Declared]:
    """The claims of a config.json and of a hf_quant_config.json, None where there is none.

    Raises `ValueError` for a format that is not read here, and for claims of another shape.
    """
    found = []
    if (settings := config.get(QUANTIZATION_CONFIG)) is not None:
        where = f"config.json's {QUANTIZATION_CONFIG}"
        method = _mapping(settings, where).get("quant_method", "modelopt")
        if method not in _METHODS:
            raise ValueError(
                f"{where} has quant_method {method!r}: read are {', '.join(_METHODS)}, or no "
                f"{QUANTIZATION_CONFIG} where the tensors are of their layouts"
            )
        found.append(_read(settings, where))
    if beside is not None:
        settings = _mapping(beside.get("quantization", {}), f"{HF_QUANT_CONFIG}'s quantization")
        found.append(_read(settings, HF_QUANT_CONFIG))
    return found


def _read(settings: Mapping[str, Any], where: str) -> Declared:
    for name in _TRANSFORMS:
        if settings.get(name):
            raise ValueError(f"{where} has a {name}, which changes the weights: not read here")
    if settings.get("format") not in (None, *_FORMATS):
        raise ValueError(
            f"{where} has format {settings['format']!r}: read are {', '.join(_FORMATS)}"
        )
    excluded = [*_texts(settings, "ignore", where), *_texts(settings, "exclude_modules", where)]
    layers = {
        module: _layout(_mapping(entry, f"{where}: {module}").get("quant_algo"), where)
        for module, entry in _mapping(settings.get("quantized_layers"), where).items()
    }
    return Declared(
        where=where,
        algorithm=_layout(settings.get("quant_algo"), where),
        layers={module: layout for module, layout in layers.items() if layout is not None},
        groups=tuple(_groups(settings, where)),
        excluded=tuple(excluded),
    )


def _groups(settings: Mapping[str, Any], where: str) -> Iterator[tuple[str, int | None]]:
    for name, group in _mapping(settings.get("config_groups"), where).items():
        weights = _mapping(_mapping(group, f"{where}: {name}").get("weights"), f"{where}: {name}")
        if not weights:
            continue
        bits, kind = weights.get("num_bits"), weights.get("type", "float")
        if kind != "float" or bits not in (4, 8):
            raise ValueError(f"{where}: {name} has {kind!r} weights of {bits!r} bits: not read")
        yield NVFP4 if bits == 4 else FP8, weights.get("group_size")


def _layout(algorithm: Any, where: str) -> str | None:
    if algorithm is None:
        return None
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS:
        raise ValueError(
            f"{where} has quant_algo {algorithm!r}: read are {', '.join(sorted(_ALGORITHMS))}"
        )
    return _ALGORITHMS[algorithm]


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} is {value!r}: an object is needed there")
    return value


def _texts(settings: Mapping[str, Any], key: str, where: str) -> list[str]:
    value = settings.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where}: {key} is {value!r}: a list of names is needed there")
    return value


def _matching(modules: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """The modules that names and patterns stand for, each once."""
    patterns = [_pattern(name) for name in names]
    wild = [p for p in patterns if p is not None and set(p) & set("*?[")]
    if len(wild) > _MOST_PATTERNS:
        raise ValueError(f"{len(wild):,} patterns exclude modules: no release has so many")
    found = {module for module in patterns if module is not None and module in modules}
    for pattern in wild:
        found |= set(matching(modules, pattern))
    return sorted(found)


def _pattern(name: str) -> str | None:
    """A name or pattern as `fnmatch` takes it; None for a regular expression beyond that."""
    if not name.startswith("re:"):
        return name
    regex = name.removeprefix("re:")
    if not _PLAIN_REGEX.fullmatch(regex):
        return None
    tail = "" if regex.endswith("$") else "*"
    text = regex.removeprefix("^").removesuffix("$").replace("\\.", "\0").replace(".*", "*")
    return text.replace(".", "?").replace("\0", ".") + tail
