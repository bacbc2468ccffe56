"""A tiny checkpoint with a tokenizer and a chat template of its own."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nemotron_v3.checkpoint import save_pretrained
from tests.models import tiny_model

TEXTS = ["say what you mean and mean what you say", "né 日本 🙂 <user> hello"] * 3
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}<|assistant|>"


def write_chat_checkpoint(folder: Path, end: tuple[int, ...] = (1, 2)) -> Path:
    """`end` are the tokens that end an answer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "<end>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    backend.save(str(folder / "tokenizer.json"))
    save_pretrained(tiny_model(vocab_size=300, eos_token_id=2, bos_token_id=0), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(end)}))
    about = {"bos_token": "<s>", "eos_token": {"content": "<end>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder
