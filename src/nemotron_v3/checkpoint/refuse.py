"""What is refused by name, with what to use instead: damaged narrow weights and pickles."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from nemotron_v3.checkpoint.errors import CheckpointError

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# (hidden size, layers, longest context) -> the release in BF16; None: any length.
_BF16_RELEASES = {
    (3136, 42, None): "NVIDIA-Nemotron-3-Nano-4B-BF16",
    (2688, 52, 262144): "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    (2688, 52, 1048576): "NVIDIA-Nemotron-3.5-Lightning-30B-A3B-BF16",
    (4096, 88, None): "NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
    (8192, 108, None): "NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    (4480, 56, None): "NVIDIA-Nemotron-Nano-9B-v2",
    (5120, 62, None): "NVIDIA-Nemotron-Nano-12B-v2",
}


def refuse_narrow(
    directory: Path, config: Mapping[str, Any], why: str, problems: Iterable[str] = ()
) -> NoReturn:
    """Raise `CheckpointError` for weights in 8 or 4 bits that cannot be read, and say what can."""
    raise CheckpointError(
        f"{directory} has quantised weights that cannot be read: {why}. Fetch the files again, or "
        f"use {_bf16_release(config)} instead",
        problems,
    )


def _bf16_release(config: Mapping[str, Any]) -> str:
    layers = config.get("layers_block_type") or config.get("hybrid_override_pattern")
    layers = len(layers) if isinstance(layers, list | str) else None
    length = config.get("max_position_embeddings")
    for (hidden, depth, longest), name in _BF16_RELEASES.items():
        if (hidden, depth) == (config.get("hidden_size"), layers) and longest in (None, length):
            return f"nvidia/{name}"
    return "the BF16 release of the same model"


def refuse_without_weights(directory: Path) -> None:
    """Raise `CheckpointError` for a directory without safetensors weights, naming what it has."""
    pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{directory} keeps its weights in {pickles[0]}, a pickle: opening one can run code, "
            "so none is ever read here. Fetch the safetensors release, or convert a file you trust "
            "with safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
        )
    raise CheckpointError(
        f"{directory} has no model.safetensors and no model.safetensors.index.json"
    )
