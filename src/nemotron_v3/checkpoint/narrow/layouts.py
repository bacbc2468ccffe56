"""Which tensors of a checkpoint together are one quantised weight, by what is stored beside each.

| layout | codes | scales | one more scale |
|---|---|---|---|
| NVFP4 | `weight` U8 `[N, K/2]` | `weight_scale` F8_E4M3 `[N, K/16]` | `weight_scale_2` |
| NVFP4, compressed-tensors | `weight_packed`, alike | alike | `weight_global_scale`, 1 over it |
| FP8 | `weight` F8_E4M3 `[N, K]` | `weight_scale`: 1, `[N, 1]`, `[N/128, K/128]` | none |

Beside them may stand scales of activations and of a cache in 8 bits, which change nothing here, and
nothing else: an unknown companion may change what a weight's values are.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nemotron_v3.checkpoint.header import TORCH_DTYPES, WEIGHT_DTYPES, Entry

NVFP4_GROUP = 16
FP8_BLOCK = 128

NVFP4, FP8 = "nvfp4", "fp8"

# Scales that have no effect, since activations and the cache are not quantised here.
_ACTIVATIONS = ("input_scale", "input_global_scale")
_CACHE = {"k_scale": "k_proj", "v_scale": "v_proj"}
_COMPANIONS = ("weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale")
_LIKE_A_COMPANION = re.compile(r"scale|zero_point|packed|qweight|qzeros|g_idx|absmax|quant")


@dataclass(frozen=True)
class StoredNarrow:
    """A quantised weight: the names of its tensors in a checkpoint, and their layout.

    `name` is what it is called as one tensor, `layout` "nvfp4" or "fp8"; `codes`, `scale` and
    `global_scale` are the names of its tensors, the last one None where there is none, and
    `divides` is whether that is the reciprocal of a factor. `shape` is `[N, K]`, `tiles` `[n, k]`:
    how many scales there are for the rows and the columns. `ignored` names scales of activations.
    """

    name: str
    layout: str
    codes: str
    scale: str
    global_scale: str | None
    divides: bool
    shape: tuple[int, int]
    tiles: tuple[int, int]
    ignored: tuple[str, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the tensors that its values come from."""
        return tuple(n for n in (self.codes, self.scale, self.global_scale) if n is not None)

    @property
    def description(self) -> str:
        """The layout in words, for messages."""
        if self.layout == NVFP4:
            return f"{NVFP4} in groups of {NVFP4_GROUP}"
        (n, k), (N, K) = self.tiles, self.shape
        if (n, k) == (1, 1):
            return f"{FP8} with one scale"
        return f"{FP8} with a scale a row" if k == 1 else f"{FP8} in blocks of {N // n}x{K // k}"


@dataclass(frozen=True)
class Narrow:
    """The narrow weights of a checkpoint by name, and the names of the `ignored` tensors.

    `name_of` maps the codes' own names to the weights', and `companions` are the stored tensors
    that are no tensors of a model.
    """

    weights: Mapping[str, StoredNarrow] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the checkpoint holds quantised weights, or tensors that belong to such."""
        return bool(self.weights or self.ignored)

    @property
    def name_of(self) -> dict[str, str]:
        return {weight.codes: name for name, weight in self.weights.items()}

    @property
    def companions(self) -> frozenset[str]:
        parts = (part for weight in self.weights.values() for part in weight.parts[1:])
        return frozenset((*parts, *self.ignored))


def find_narrow(entries: Mapping[str, Entry]) -> tuple[Narrow, list[str]]:
    """The narrow weights among the tensors of a checkpoint, and what is wrong with them, one line
    for each tensor."""
    modules: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if _is_narrow(leaf, entry):
            modules.setdefault(module, {})
    for name, entry in entries.items():
        module, _, leaf = name.rpartition(".")
        if module in modules:
            modules[module][leaf] = entry
    weights, ignored, problems = {}, [], []
    for module, held in modules.items():
        found = _Module(module, held)
        ignored += found.of_cache(entries)
        problems += found.problems
        if found.weight is not None:
            weights[found.weight.name] = found.weight
            ignored += found.weight.ignored
    return Narrow(weights, tuple(ignored)), problems


def _is_narrow(leaf: str, entry: Entry) -> bool:
    """Whether a tensor is one of a narrow weight's, a scale, or like one."""
    return (
        entry.dtype.startswith(("F4", "F6_", "F8_"))
        or (leaf == "weight" and entry.dtype not in WEIGHT_DTYPES)
        or _LIKE_A_COMPANION.search(leaf) is not None
    )


class _Module:
    """The tensors of one module, `held` by the last parts of their names."""

    def __init__(self, module: str, held: Mapping[str, Entry]):
        self.module, self.held = module, held
        self.weight: StoredNarrow | None = None
        self.problems = list(self._strangers())
        if self.problems:
            return
        ignored = tuple(self._name(leaf) for leaf in _ACTIVATIONS if leaf in held)
        packed, plain = held.get("weight_packed"), held.get("weight")
        if packed is not None and plain is not None:
            self._say("weight_packed", "stands beside a weight: one of them is too many")
        elif packed is not None:
            self._read_fp4("weight_packed", "weight_global_scale", ignored)
        elif plain is not None and plain.dtype == "U8":
            self._read_fp4("weight", "weight_scale_2", ignored)
        elif plain is not None and plain.dtype == "F8_E4M3":
            self._read_fp8(ignored)
        else:
            for leaf in (*_COMPANIONS, *_ACTIVATIONS):
                if leaf in held:
                    self._say(leaf, "is the scale of no narrow weight: there is none beside it")

    def _strangers(self) -> Iterator[str]:
        known = {*_COMPANIONS, *_ACTIVATIONS, *_CACHE}
        for leaf, entry in self.held.items():
            name = self._name(leaf)
            if entry.dtype not in TORCH_DTYPES:
                yield f"{name} is {entry.dtype}, which is not read here"
            elif leaf not in known and _LIKE_A_COMPANION.search(leaf):
                yield f"{name} is unknown, and may change what the weight beside it is"
            elif leaf not in ("weight", "weight_scale", *known) and entry.dtype == "F8_E4M3":
                yield f"{name} is F8_E4M3: only a weight is read in 8 bits, with its weight_scale"

    def of_cache(self, entries: Mapping[str, Entry]) -> list[str]:
        """The scales of keys and values among them, which belong to an attention layer."""
        found = []
        for leaf, projection in _CACHE.items():
            if leaf not in self.held:
                continue
            inside = self.module.endswith(f".{projection}")
            owner = self.module if inside else f"{self.module}.{projection}"
            if f"{owner}.weight" in entries or f"{owner}.weight_packed" in entries:
                if self._is_one_float(leaf):
                    found.append(self._name(leaf))
            else:
                self._say(leaf, f"is the scale of no cache: there is no {owner}.weight")
        return found

    def _read_fp4(self, codes: str, global_scale: str, ignored: tuple[str, ...]) -> None:
        held = self.held[codes]
        name = self._name(codes)
        if held.dtype != "U8" or len(held.shape) != 2 or 0 in held.shape:
            self._say(codes, f"is {held.dtype} {held.shape}, not two codes a byte: U8 (N, K/2)")
            return
        N, K = held.shape[0], 2 * held.shape[1]
        other = ({"weight_scale_2", "weight_global_scale"} - {global_scale}).pop()
        if other in self.held:
            self._say(other, f"does not belong beside {name}: its scale is {global_scale}")
        if K % NVFP4_GROUP:
            self._say(codes, f"has {K} columns, no multiple of its groups of {NVFP4_GROUP}")
            return
        scale = self._find("weight_scale", codes)
        tiles = (N, K // NVFP4_GROUP)
        if scale is not None and (scale.dtype != "F8_E4M3" or scale.shape != tiles):
            self._say(
                "weight_scale",
                f"is {scale.dtype} {scale.shape}: beside {name} groups of {NVFP4_GROUP} need "
                f"F8_E4M3 {tiles}",
            )
        if self._find(global_scale, codes) is not None:
            self._is_one_float(global_scale)
        if not self.problems:
            self.weight = StoredNarrow(
                name=self._name("weight"),
                layout=NVFP4,
                codes=name,
                scale=self._name("weight_scale"),
                global_scale=self._name(global_scale),
                divides=global_scale == "weight_global_scale",
                shape=(N, K),
                tiles=tiles,
                ignored=ignored,
            )

    def _read_fp8(self, ignored: tuple[str, ...]) -> None:
        held = self.held["weight"]
        name = self._name("weight")
        if len(held.shape) != 2 or 0 in held.shape:
            self._say("weight", f"is F8_E4M3 {held.shape}, not (N, K)")
            return
        for leaf in ("weight_scale_2", "weight_global_scale"):
            if leaf in self.held:
                self._say(leaf, f"does not belong beside {name}, which is F8_E4M3")
        scale = self._find("weight_scale", "weight")
        tiles = None if scale is None else _fp8_tiles(scale.shape, *held.shape)
        if scale is not None and (tiles is None or scale.dtype not in WEIGHT_DTYPES):
            N, K = held.shape
            blocks = ""
            if N % FP8_BLOCK == K % FP8_BLOCK == 0:
                blocks = f", or ({N // FP8_BLOCK}, {K // FP8_BLOCK}) for blocks of {FP8_BLOCK}"
            self._say(
                "weight_scale",
                f"is {scale.dtype} {scale.shape}: beside {name} {held.shape} one float is needed, "
                f"({N}, 1) for one a row{blocks}",
            )
        if tiles is not None and not self.problems:
            scales = self._name("weight_scale")
            self.weight = StoredNarrow(
                name, FP8, name, scales, None, False, held.shape, tiles, ignored
            )

    def _find(self, leaf: str, beside: str) -> Entry | None:
        if leaf not in self.held:
            self._say(leaf, f"is missing beside {self._name(beside)}")
        return self.held.get(leaf)

    def _is_one_float(self, leaf: str) -> bool:
        entry = self.held[leaf]
        fits = entry.dtype in WEIGHT_DTYPES and math.prod(entry.shape) == 1
        if not fits:
            self._say(leaf, f"is {entry.dtype} {entry.shape}: one float is needed")
        return fits

    def _say(self, leaf: str, problem: str) -> None:
        self.problems.append(f"{self._name(leaf)} {problem}")

    def _name(self, leaf: str) -> str:
        return f"{self.module}.{leaf}" if self.module else leaf


def _fp8_tiles(shape: tuple[int, ...], N: int, K: int) -> tuple[int, int] | None:
    """How many scales of `shape` there are for the rows and columns of a weight `[N, K]`; None for
    a shape that is none of the layouts'. Sizes of 1 may stand anywhere between the others."""
    if math.prod(shape) == 1:
        return 1, 1
    if shape in ((N,), (N, 1)):
        return N, 1
    blocks = (N // FP8_BLOCK, K // FP8_BLOCK)
    squeezed = tuple(size for size in shape if size != 1)
    if N % FP8_BLOCK or K % FP8_BLOCK or squeezed != tuple(size for size in blocks if size != 1):
        return None
    return blocks if len(shape) > 1 else None
