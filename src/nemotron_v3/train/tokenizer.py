"""The tokeniser and chat template of a run: the checkpoint's, or those of a folder."""

from dataclasses import replace

import torch

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.checkpoint.side_files import MAX_BYTES, names_in
from nemotron_v3.config.atomic import atomic_file
from nemotron_v3.config.files import read_bytes
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


def save_tokenizer(tokenizer: PretrainedTokenizer | Tokenizer, options: TrainOptions) -> None:
    """Write what belongs to a fresh model's tokeniser into the run's folder.

    Raises:
        ValueError: a tokeniser of another kind than our own, and no folder that holds it.
    """
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(options.out)
        return
    folder = options.model.tokenizer
    if folder is None:
        raise ValueError("a tokenizer is saved from its folder: give model.tokenizer")
    for name in names_in(folder):
        (options.out / name).parent.mkdir(exist_ok=True)
        with atomic_file(options.out / name) as path:
            path.write_bytes(read_bytes(folder / name, MAX_BYTES))


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
