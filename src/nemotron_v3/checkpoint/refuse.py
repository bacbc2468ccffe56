"""What is refused by name, with what to use instead: quantised releases and pickles."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.header import Entry

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SCALES = ("_scale", "_scale_2", "_scale_inv", ".scale", ".qweight", ".qzeros", "_zero_point")

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


def refuse_quantised_config(directory: Path, config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the files beside the weights say that they are quantised."""
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        told = f" (quant_method {method})" if isinstance(method, str) else ""
        _refuse(directory, config, f"its config.json has a quantization_config{told}")
    if (directory / "hf_quant_config.json").exists():
        _refuse(directory, config, "it has a hf_quant_config.json")


def refuse_quantised_tensors(
    directory: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, Entry]]
) -> None:
    """Raise `CheckpointError` where tensors are in 4 to 8 bits or come with scales."""
    found = [
        f"{name} ({entry.dtype})"
        for name, entry in tensors
        if entry.dtype.startswith(("F4", "F6_", "F8_")) or name.endswith(_SCALES)
    ]
    if found:
        _refuse(
            directory, config, f"it holds {len(found)} quantised tensors or scales, as {found[0]}"
        )


def _refuse(directory: Path, config: Mapping[str, Any], why: str) -> None:
    raise CheckpointError(
        f"{directory} is a quantised release: {why}. Only BF16, FP16 and FP32 weights are read "
        f"here: use {_bf16_release(config)} instead"
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
