"""What lies beside the weights of a checkpoint, and goes where they go: tokenizer, chat template,
generation config."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemotron_v3.checkpoint.errors import CheckpointError
from nemotron_v3.checkpoint.narrow.declared import HF_QUANT_CONFIG
from nemotron_v3.config.files import exists, parse_object, read_bytes

GENERATION_CONFIG = "generation_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE, _LEGACY_TEMPLATE = "chat_template.jinja", "chat_template.json"
SIDE_FILES = (
    GENERATION_CONFIG, "tokenizer.json", TOKENIZER_CONFIG, "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    TEMPLATE, _LEGACY_TEMPLATE,
)  # fmt: skip
"""What is taken along with the weights, byte for byte. Code is not."""
OF_WEIGHTS = (GENERATION_CONFIG, HF_QUANT_CONFIG)
"""Those that are no tokenizer's and no template's."""
MORE_TEMPLATES = "additional_chat_templates"
"""A folder of chat templates, which is taken along too."""

MAX_GENERATION_CONFIG_BYTES = 2**20
MAX_BYTES = 2**28
MAX_TEMPLATES = 100


def names_in(directory: Path, narrow: bool = False) -> tuple[str, ...]:
    """The side files in a directory, as paths below it; with `narrow` what speaks of weights in 8
    or 4 bits is one.

    Raises:
        CheckpointError: more chat templates than any checkpoint has.
    """
    known = (*SIDE_FILES, HF_QUANT_CONFIG) if narrow else SIDE_FILES
    names = [name for name in known if exists(directory / name)]
    if (directory / MORE_TEMPLATES).is_dir():
        more = sorted(path.name for path in (directory / MORE_TEMPLATES).glob("*.jinja"))
        if len(more) > MAX_TEMPLATES:
            raise CheckpointError(f"{directory / MORE_TEMPLATES} holds {len(more)} chat templates")
        names += [f"{MORE_TEMPLATES}/{name}" for name in more]
    return tuple(names)


def read_side_files(path: Path, directory: Path, narrow: bool = False) -> dict[str, bytes]:
    """The side files (see `names_in`) of the checkpoint that was opened as `path` and lies in
    `directory`.

    They are two where an interrupted save left the checkpoint; what it was to replace counts where
    it brought nothing in its place.

    Raises:
        CheckpointError: one is no regular file, or too large.
        OSError: one cannot be read.
    """
    places = {name: path / name for name in names_in(path, narrow)}
    places |= {name: directory / name for name in names_in(directory, narrow)}
    found = {}
    for name, place in places.items():
        limit = MAX_GENERATION_CONFIG_BYTES if name == GENERATION_CONFIG else MAX_BYTES
        try:
            found[name] = read_bytes(place, limit)
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    return found


def templates_in(folder: Path) -> dict[str, bytes]:
    """The files of a folder's chat templates; those in a `tokenizer_config.json` are not among
    them."""
    names = [n for n in names_in(folder) if is_template(n) and n != _LEGACY_TEMPLATE]
    return {name: read_bytes(folder / name, MAX_BYTES) for name in names}


def with_templates(files: Mapping[str, bytes], templates: Mapping[str, bytes]) -> dict[str, bytes]:
    """Side files with other chat templates than their own, where there are some.

    Raises:
        CheckpointError: the tokenizer_config.json among `files` is no JSON object.
    """
    if not templates:
        return dict(files)
    kept = {name: raw for name, raw in files.items() if not is_template(name)}
    if TOKENIZER_CONFIG in kept:
        about = _parsed(kept[TOKENIZER_CONFIG], TOKENIZER_CONFIG)
        if about.pop("chat_template", None) is not None:
            text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
            kept[TOKENIZER_CONFIG] = text.encode("utf-8", "surrogatepass")
    return kept | dict(templates)


def is_template(name: str) -> bool:
    """Whether a side file is a chat template."""
    return name in (TEMPLATE, _LEGACY_TEMPLATE) or name.startswith(f"{MORE_TEMPLATES}/")


def read_generation_config(files: Mapping[str, bytes], path: Path) -> dict[str, Any] | None:
    """What the generation config among `files` says; None where there is none.

    Raises:
        CheckpointError: it is no JSON object.
    """
    raw = files.get(GENERATION_CONFIG)
    return None if raw is None else _parsed(raw, str(path / GENERATION_CONFIG))


def _parsed(raw: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_object(raw.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is no UTF-8 text: byte {error.start}") from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def side_files_to_write(
    came_with: Mapping[str, bytes], generation_config: Mapping[str, Any] | None, target: Path
) -> dict[str, bytes]:
    """What is saved to `target` beside the weights.

    What came with the model, as it came; it does not replace what stands there with other content,
    which is somebody's work, and a warning says so. The generation config is the model's own, as
    its config is: where it was changed on the model, it replaces what stands there.

    Raises:
        CheckpointError: the generation config cannot be written as JSON.
    """
    files = dict(came_with)
    changed = generation_config != read_generation_config(files, target)
    if changed:
        files.pop(GENERATION_CONFIG, None)
        if generation_config is not None:
            files[GENERATION_CONFIG] = _text(generation_config)
    kept = [
        name
        for name, raw in files.items()
        if not (changed and name == GENERATION_CONFIG) and _differs(target / name, raw)
    ]
    if kept:
        warnings.warn(
            f"{target} has {', '.join(kept)} with other content than what the model was loaded "
            "with: left as it is; remove it before saving to have the model's",
            stacklevel=4,
        )
    return {name: raw for name, raw in files.items() if name not in kept}


def _text(generation_config: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(dict(generation_config), indent=2) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"model.generation_config cannot be written as JSON ({error}): give plain values"
        ) from None


def _differs(path: Path, raw: bytes) -> bool:
    """Whether something else than `raw` stands at `path`."""
    if not exists(path):
        return False
    try:
        return read_bytes(path, len(raw)) != raw
    except ValueError:  # larger, or no file
        return True


def write_side_files(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` below a directory."""
    for name, raw in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(raw)
