"""The tokeniser and chat template of a run: the checkpoint's, or those of a folder."""

from dataclasses import replace

import torch

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.checkpoint.side_files import MAX_BYTES, names_in, with_templates
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


def files_of(tokenizer: PretrainedTokenizer | Tokenizer, options: TrainOptions) -> dict[str, bytes]:
    """What stands beside the weights that were trained: the files of a tokenizer that was given
    or made, and a chat template that was given; nothing of what the checkpoint itself has.

    Raises:
        ValueError: a tokeniser of another kind than our own, and no folder that holds it.
        OSError: one cannot be read.
    """
    folder, files = options.model.tokenizer, dict[str, bytes]()
    if folder is not None:
        files |= {name: read_bytes(folder / name, MAX_BYTES) for name in names_in(folder)}
    elif options.model.path is None:
        if not isinstance(tokenizer, Tokenizer):
            raise ValueError("a tokenizer is saved from its folder: give model.tokenizer")
        files |= {name: text.encode() for name, text in tokenizer.texts().items()}
    return with_templates(files, trained_templates(tokenizer, options))


def trained_templates(
    tokenizer: PretrainedTokenizer | Tokenizer, options: TrainOptions
) -> dict[str, bytes]:
    """The files of the chat template that was given; none where it is that of the checkpoint or of
    the folder of the tokenizer.

    Raises:
        ValueError: no template.
    """
    template, folder = options.data.chat_template, options.model.tokenizer or options.model.path
    if template is None or (folder is not None and template == str(folder)):
        return {}
    return read_template(template, tokenizer.special_tokens).files()


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
