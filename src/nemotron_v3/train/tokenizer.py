"""The tokeniser and chat template of a run: the checkpoint's, or those of a folder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.checkpoint.side_files import MAX_BYTES, OF_WEIGHTS, names_in, with_templates
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import read_bytes
from nemotron_v3.data.encode import read_template
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.data.train_tokenizer import train_tokenizer
from nemotron_v3.train.build import read_model_config
from nemotron_v3.train.options import TrainOptions


def read_tokenizer(options: TrainOptions) -> PretrainedTokenizer | Tokenizer:
    """The checkpoint's, that of a folder, or one that is trained on the data of a fresh model,
    with as many tokens as its config has; the same files give the same one.

    Raises:
        ValueError: there is none in the folder, or nothing to train one on.
    """
    folder = options.model.tokenizer or options.model.path
    if folder is not None:
        return PretrainedTokenizer.load(folder)
    config = read_model_config(options.model, torch.device("cpu"))
    return train_tokenizer(options.data.sources, config.vocab_size)


def with_template(options: TrainOptions) -> TrainOptions:
    """The options with the checkpoint's chat template, where it has one and none is told."""
    folder = options.model.tokenizer or options.model.path
    if options.data.chat_template is not None or folder is None:
        return options
    try:
        ChatTemplate.load(folder)
    except ValueError:
        return options  # the data says what is wrong, if there are chats
    return replace(options, data=replace(options.data, chat_template=str(folder)))


def trained_templates(
    tokenizer: PretrainedTokenizer | Tokenizer, options: TrainOptions
) -> dict[str, bytes]:
    """The files of the chat template that a run was told to train with; none where it is the one
    of the tokenizer's folder, which comes along with it.

    Raises:
        ValueError: no template.
    """
    told, folder = options.data.chat_template, options.model.tokenizer or options.model.path
    if told is None or (folder is not None and told == str(folder)):
        return {}
    files = read_template(told, tokenizer.special_tokens).files()
    return {name: text.encode("utf-8", "surrogatepass") for name, text in files.items()}


def exchanged(
    came_with: Mapping[str, bytes],
    tokenizer: PretrainedTokenizer | Tokenizer,
    options: TrainOptions,
) -> dict[str, bytes]:
    """What is saved beside the weights of a checkpoint that a run went on with: what came with it,
    but for the tokenizer and the chat template that it was trained with in their place.

    Raises:
        ValueError: a file that cannot be read.
    """
    files = dict(came_with)
    if options.model.tokenizer is not None:
        files = {name: raw for name, raw in files.items() if name in OF_WEIGHTS}
        files |= _of_tokenizer(options.model.tokenizer)
    return with_templates(files, trained_templates(tokenizer, options))


def save_tokenizer(tokenizer: PretrainedTokenizer | Tokenizer, options: TrainOptions) -> None:
    """Write what belongs to a fresh model's tokeniser into the run's folder, and the chat template
    that it was trained with.

    Raises:
        ValueError: a tokeniser of another kind than our own, and no folder that holds it.
    """
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(options.out)
        files = {}
    elif options.model.tokenizer is None:
        raise ValueError("a tokenizer is saved from its folder: give model.tokenizer")
    else:
        files = _of_tokenizer(options.model.tokenizer)
    write_atomically(options.out, with_templates(files, trained_templates(tokenizer, options)))


def _of_tokenizer(folder: Path) -> dict[str, bytes]:
    names = [name for name in names_in(folder) if name not in OF_WEIGHTS]
    return {name: read_bytes(folder / name, MAX_BYTES) for name in names}


def write_atomically(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files below a folder, each whole or not at all."""
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with atomic_file(folder / name) as path:
            path.write_bytes(raw)
