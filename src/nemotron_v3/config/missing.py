"""Error texts for a folder without a model's config: what it is, and what to give instead."""

import os
from pathlib import Path

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
RUN = "train.toml"
NOT_FETCHED = (
    "give the folder of a checkpoint; a released one is downloaded first, for nothing is fetched "
    "from the network here"
)


def no_config(folder: str | os.PathLike[str]) -> str:
    """That a folder has no config.json; and the way out, where it is an adapter or a run."""
    return instead_of_a_model(folder) or f"{folder} has no {CONFIG}"


def instead_of_a_model(folder: str | os.PathLike[str]) -> str | None:
    """What a folder holds in a model's place, or that it is not there, and the way out; None where
    it is there and neither an adapter nor a run."""
    folder = Path(folder)
    if not folder.exists():
        return f"{folder} does not exist: {NOT_FETCHED}"
    if (folder / CONFIG).exists():
        return None
    if (folder / ADAPTER).is_file():
        base = _base_of(folder / ADAPTER)
        return (
            f"{folder} is a LoRA adapter{f' of {base}' if base else ''}: give "
            f"{base or 'the checkpoint that it was trained on'}, with the adapter beside it "
            f"(generate and eval --adapter {folder}), or merge both first "
            f"(nemotron-v3 convert {base or 'BASE'} MERGED --adapter {folder})"
        )
    if (folder / RUN).is_file():
        return (
            f"{folder} is a run that has left no checkpoint yet: let it end, or go on with it "
            f"(nemotron-v3 train {folder} --resume)"
        )
    return None


def _base_of(path: Path) -> str | None:
    """The base that an adapter's config names; None where it cannot be read."""
    from nemotron_v3.config.files import read_object

    try:
        base = read_object(path).get("base_model_name_or_path")
    except (OSError, ValueError):
        return None
    return base if isinstance(base, str) and base else None
