"""The tokeniser and chat template of a run: the checkpoint's, or those of a folder."""

from dataclasses import replace

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.train.options import ModelOptions, TrainOptions


def read_tokenizer(model: ModelOptions) -> PretrainedTokenizer:
    """Raises ValueError where there is none."""
    folder = model.tokenizer or model.path
    if folder is None:
        raise ValueError(
            "a fresh model has no tokeniser: give model.tokenizer, a folder with a tokenizer.json"
        )
    return PretrainedTokenizer.load(folder)


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
