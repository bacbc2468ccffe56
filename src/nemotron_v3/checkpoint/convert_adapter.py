"""A LoRA adapter in PEFT's format, read so that it can be merged into a checkpoint.

The directory holds adapter_config.json and adapter_model.safetensors. Tensor names are
`base_model.model.<module>.lora_A.weight` and `.lora_B.weight` (`lora_embedding_A` and `_B` for
embeddings, `lora_magnitude_vector` for DoRA); `adapter_names` reads other spellings too. Adapters
of a stack of experts hold the ranks of all of them side by side. Any other tensor replaces the
base's tensor of that name (`modules_to_save`, trained biases).
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron_v3.checkpoint.adapter_config import config_problems
from nemotron_v3.checkpoint.adapter_names import both_spellings, plain_adapter_name
from nemotron_v3.checkpoint.adapter_patterns import find
from nemotron_v3.checkpoint.adapter_targets import target_problems
from nemotron_v3.checkpoint.convert_pieces import LowRank, Part
from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import WEIGHT_DTYPES, read_json
from nemotron_v3.checkpoint.names import EMBEDDINGS, Place, is_stack, to_memory
from nemotron_v3.checkpoint.reader import MAX_CONFIG_BYTES, Shard

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<kind>A|B|magnitude_vector)(\.weight)?"
)
# Initialisations that leave the base's weights as they are; the others train against changed ones.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Settings that change what a layer computes, with what PEFT writes where they are not used.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "fan_in_fan_out": (False, None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "monteclora_config": (None,),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
}


@dataclass
class Adapter:
    """What an adapter does to a model.

    `updates` maps a tensor in memory, and the expert where it is a stack, to its change; `replaced`
    maps a tensor to what takes its place; `left_out` counts the adapter's tensors of layers that
    are not converted. `ranks` and `modules` say what it is made of.
    """

    path: Path
    updates: dict[tuple[str, int | None], LowRank] = field(default_factory=dict)
    replaced: dict[str, Part] = field(default_factory=dict)
    left_out: int = 0

    @property
    def ranks(self) -> tuple[int, ...]:
        return tuple(sorted({update.A.shape[0] for update in self.updates.values()}))

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors of the model that it changes."""
        return tuple(dict.fromkeys([*(name for name, _ in self.updates), *self.replaced]))


def read_adapter(
    path: str | os.PathLike[str],
    destinations: Mapping[str, Tensor],
    layers: Mapping[int, int],
    depth: int,
) -> Adapter:
    """The adapter in the directory `path`, for the model whose tensors are `destinations`.

    `layers` maps the layers that are converted, of `depth`, to those of the model. Raises
    `CheckpointError` for what is no LoRA adapter that can be merged, and with every tensor that
    the model does not have, in another shape, without its other half, or not finite.
    """
    path = Path(path)
    config = _read_config(path)
    shard = _open(path)
    reader = _Reader(Adapter(path), config, shard, destinations, layers, depth)
    for name in shard.entries:
        reader.sort(name)
    for module, halves in reader.halves.items():
        reader.pair(module, halves)
    if not reader.problems:
        changed = reader.adapter.updates
        reader.problems += target_problems(config, changed, reader.saved, destinations, layers)
    if reader.problems:
        raise CheckpointError(
            f"{path}: {len(reader.problems)} tensors of the adapter do not fit the checkpoint",
            reader.problems,
        )
    adapter = reader.adapter
    if not adapter.tensors:
        detail = f": all its {adapter.left_out} tensors are of layers left out"
        raise CheckpointError(
            f"{path}: the adapter changes nothing{detail * bool(adapter.left_out)}"
        )
    return adapter


def _read_config(path: Path) -> dict[str, Any]:
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} has no {CONFIG}: give the directory of a PEFT adapter")
    config = read_json(path / CONFIG, MAX_CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: an adapter of type {kind!r}: only LORA is merged here")
    if problems := config_problems(config):
        raise CheckpointError(f"{path / CONFIG} cannot be an adapter's", problems)
    problems = [
        f"{key} is {config[key]!r}"
        for key, unused in _UNSUPPORTED.items()
        if config.get(key) not in unused
    ]
    init = config.get("init_lora_weights", True)
    if not isinstance(init, (bool, str)) or init not in _INITS:
        problems.append(
            f"init_lora_weights is {init!r}: it belongs to a base whose weights were changed"
        )
    if problems:
        raise CheckpointError(
            f"{path}: an adapter that cannot be merged here: merge it with PEFT's "
            "merge_and_unload, then save the model",
            problems,
        )
    return config


def _open(path: Path) -> Shard:
    if not (path / WEIGHTS).is_file():
        detail = ""
        if (path / "adapter_model.bin").exists():
            detail = ": adapter_model.bin is a pickle, and opening one can run code; save it again "
            detail += "with PEFT's safe_serialization=True"
        raise CheckpointError(f"{path} has no {WEIGHTS}{detail}")
    try:
        return Shard(path / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{path / WEIGHTS}: {error.strerror or error}") from error


@dataclass
class _Reader:
    """Sorts an adapter's tensors by the module they change, then makes a change of each pair."""

    adapter: Adapter
    config: Mapping[str, Any]
    shard: Shard
    destinations: Mapping[str, Tensor]
    layers: Mapping[int, int]
    depth: int
    halves: dict[str, dict[str, str]] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def sort(self, name: str) -> None:
        short = plain_adapter_name(name)
        if self.shard.entries[name].dtype not in WEIGHT_DTYPES:
            self.problems.append(f"dtype: {name} is {self.shard.entries[name].dtype}")
        elif not self.shard.tensor(name).isfinite().all():
            self.problems.append(f"not finite: {name} holds NaN or infinity")
        elif match := _LORA.fullmatch(short):
            kind = (match["embedding"] or "") + match["kind"]
            halves = self.halves.setdefault(match["module"], {})
            if kind in halves:
                self.problems.append(f"twice: {halves[kind]} and {name} are one tensor")
            halves[kind] = name
        else:
            self._replace(name, short.replace(".base_layer.", "."))

    def _replace(self, name: str, short: str) -> None:
        self.saved.append(short)
        place = self._place(short, name)
        if place is None:
            return
        wanted = tuple(self.destinations[place.memory].shape)
        shape = self.shard.entries[name].shape
        if place.expert is not None or shape != wanted:
            self.problems.append(f"shape: {name} is {shape}, {place.memory} is {wanted}")
        elif place.memory in self.adapter.replaced:
            twin = self.adapter.replaced[place.memory].name
            self.problems.append(f"twice: {twin} and {name} are one tensor")
        else:
            self.adapter.replaced[place.memory] = Part(self.shard, name, replaces=True)

    def _place(self, disk: str, name: str) -> Place | None:
        """The place in memory of the base's tensor `disk`; if there is none, None and a problem."""
        place = to_memory(disk, self.layers)
        if place is None or place.memory not in self.destinations:
            layer = place.layer if place else None
            if layer is not None and layer not in self.layers and layer < self.depth:
                self.adapter.left_out += 1
            else:
                self.problems.append(f"unexpected: {name}: the checkpoint has no {disk}")
            return None
        if place.layer is not None and place.layer not in self.layers:
            self.adapter.left_out += 1
            return None
        return place

    def pair(self, module: str, halves: Mapping[str, str]) -> None:
        kinds = set(halves)
        embedding = kinds == {"embedding_A", "embedding_B"}
        if not embedding and not {"A", "B"} <= kinds <= {"A", "B", "magnitude_vector"}:
            detail = ", ".join(f"lora_{kind}" for kind in sorted(kinds))
            self.problems.append(f"half: {module} has {detail} alone, not lora_A and lora_B")
            return
        tensors = {kind: self.shard.tensor(name) for kind, name in halves.items()}
        if re.search(r"\.experts(\.base_layer)*$", module):
            return self._stack(module, tensors["A"], tensors["B"])
        place = self._place(f"{module}.weight", next(iter(halves.values())))
        if place is None:
            return None
        if embedding:  # the change of a row is A[:, row] B^T
            a, b = tensors["embedding_B"].T, tensors["embedding_A"].T
        else:
            a, b = tensors["A"], tensors["B"]
        wanted = tuple(self.destinations[place.memory].shape)
        wanted = wanted if place.expert is None else wanted[1:]
        if len(wanted) != 2 or not _fits(a, b, wanted):
            detail = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            self.problems.append(f"shape: {module}: {detail}, the weight is {wanted}")
            return None
        if place.memory == EMBEDDINGS and not embedding:
            self.problems.append(f"unexpected: {module}: embeddings take lora_embedding_A and _B")
            return None
        magnitude = tensors.get("magnitude_vector")
        if magnitude is not None and tuple(magnitude.shape) != wanted[:1]:
            detail = f"lora_magnitude_vector {tuple(magnitude.shape)}"
            self.problems.append(f"shape: {module}: {detail}, the weight is {wanted}")
            return None
        if bool(self.config.get("use_dora")) != (magnitude is not None):
            detail = "has a" if magnitude is not None else "has no"
            self.problems.append(
                f"dora: {module} {detail} lora_magnitude_vector, and use_dora is "
                f"{self.config.get('use_dora', False)}"
            )
            return None
        self._add(module, place.memory, place.expert, a, b, magnitude)
        return None

    def _add(
        self,
        module: str,
        memory: str,
        expert: int | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor | None = None,
    ) -> None:
        if (memory, expert) in self.adapter.updates:
            which = memory if expert is None else f"expert {expert} of {memory}"
            self.problems.append(f"twice: {module} is another change of {which}")
            return
        update = LowRank(a, b, self._scale(module, a.shape[0]), magnitude)
        self.adapter.updates[memory, expert] = update

    def _stack(self, module: str, a: Tensor, b: Tensor) -> None:
        """A `[E r, I]`, expert by expert, and B `[O, r E]`, rank by rank: by the shapes alone it is
        known which of the two stacks they belong to."""
        stem = re.sub(r"(\.base_layer)+$", "", module)
        fitting = []
        for projection in ("up_proj", "down_proj"):
            place = to_memory(f"{stem}.{projection}", self.layers)
            if place is not None and place.layer is not None and place.layer not in self.layers:
                if place.layer < self.depth:
                    self.adapter.left_out += 2
                    return
                break
            if place is None or not is_stack(place.memory):
                break
            target = self.destinations.get(place.memory)
            if target is None:
                break
            experts, wanted = target.shape[0], tuple(target.shape[1:])
            if a.dim() == b.dim() == 2 and a.shape[0] % experts == 0 and _fits(a, b, wanted):
                fitting.append(place.memory)
        if len(fitting) != 1:
            detail = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            why = "fit both of its stacks" if fitting else "fit none of the checkpoint's stacks"
            self.problems.append(f"shape: {module}: {detail} {why}")
            return
        experts = self.destinations[fitting[0]].shape[0]
        rank = a.shape[0] // experts
        a_each = a.reshape(experts, rank, a.shape[1])
        b_each = b.reshape(b.shape[0], rank, experts)
        for e in range(experts):
            if (fitting[0], e) in self.adapter.updates:
                self.problems.append(f"twice: {module} is another change of {fitting[0]}")
                return
        scale = self._scale(stem, rank)
        for e in range(experts):
            self.adapter.updates[fitting[0], e] = LowRank(a_each[e], b_each[:, :, e], scale)

    def _scale(self, module: str, rank: int) -> float:
        """PEFT's: alpha / r, or alpha / sqrt(r); a pattern is for the modules whose name, or its
        end, it is."""
        matched = self._pattern_values("rank_pattern", module)
        ranks = set(matched.values()) or {self.config.get("r", rank)}
        if rank not in ranks:
            said = " or ".join(map(str, sorted(ranks)))
            self.problems.append(f"rank: {module} has rank {rank}, {CONFIG} says {said}")
        matched = self._pattern_values("alpha_pattern", module)
        if len(set(matched.values())) > 1:
            # PEFT goes by the first one, and writes them in another order than it was given.
            listed = " and ".join(f"{pattern!r} ({value})" for pattern, value in matched.items())
            self.problems.append(
                f"alpha: {module} is matched by {listed} of alpha_pattern, and which of them was "
                "trained with is not in the file: leave that one"
            )
        alpha = next(iter(matched.values()), self.config.get("lora_alpha", 8))
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _pattern_values(self, field: str, module: str) -> dict[str, Any]:
        """The entries of a table of patterns that are for a module, under either prefix."""
        names = both_spellings(module)
        table = self.config.get(field) or {}
        return {pattern: value for pattern, value in table.items() if find(pattern, names)}


def _fits(a: Tensor, b: Tensor, wanted: tuple[int, ...]) -> bool:
    if not (a.dim() == b.dim() == 2 and a.shape[0]):
        return False
    return (b.shape[0], a.shape[1]) == tuple(wanted) and a.shape[0] == b.shape[1]
