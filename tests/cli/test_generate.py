"""`nemotron-v3 generate` on a tiny checkpoint with a tokenizer of its own."""

import json
import shutil
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from nemotron_v3.checkpoint import from_pretrained, save_pretrained
from nemotron_v3.cli import main as cli
from nemotron_v3.cli.generate import Sampling
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.generation import Chat, ChatTemplate, GenerationOptions, generate
from tests.models import tiny_model

TEXTS = ["say what you mean and mean what you say", "né 日本 🙂 <user> hello"] * 3
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>{% endfor %}<|assistant|>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
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
    model = tiny_model(vocab_size=300, eos_token_id=2, bos_token_id=0)
    save_pretrained(model, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    about = {"bos_token": "<s>", "eos_token": {"content": "<end>"}, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def run(*arguments, said=""):
    command = [sys.executable, "-m", "nemotron_v3.cli.main", "generate", *map(str, arguments)]
    return subprocess.run(command, input=said, capture_output=True, text=True)


def test_a_prompt_is_continued_on_stdout(folder):
    done = run(folder, "--prompt", "say what", "--temperature", 0, "--max-new-tokens", 12)
    tokenizer = PretrainedTokenizer.load(folder)
    prompt = tokenizer.encode("say what")
    assert prompt[0] == 0
    out = generate(
        from_pretrained(folder), prompt, tokenizer=tokenizer, max_new_tokens=12,
        eos_token_id=[1, 2],
    )  # fmt: skip
    assert done.stdout == f"say what{out.text[0]}\n"
    assert done.stderr.startswith(f"{len(out.new_tokens[0])} tokens, ")
    assert done.returncode == 0


def test_a_chat_is_held_on_stdin(folder):
    options = {"max_new_tokens": 6, "do_sample": True, "seed": 1, "top_k": 5, "top_p": 0.95}
    tokenizer = PretrainedTokenizer.load(folder, add_special_tokens=False)
    chat = Chat(
        from_pretrained(folder), tokenizer, ChatTemplate.load(folder), "mean it",
        eos_token_id=[1, 2], temperature=0.7, **options,
    )  # fmt: skip
    answers = ["".join(t.text for t in chat.say(text)) for text in ("hello", "you say")]
    done = run(
        folder, "--chat", "--system", "mean it", "--prompt", "hello", "--max-new-tokens", 6,
        "--seed", 1, "--top-k", 5, said="\nyou say\n",
    )  # fmt: skip
    assert done.stderr.count("tokens/s") == 2, done.stderr
    assert done.stdout == f"{answers[0]}\n> > {answers[1]}\n> \n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --prompt TEXT, or --chat"),
        (["--prompt", "a", "--system", "b"], "--system is a chat's"),
        (["--prompt", "a", "--dtype", "int3"], "dtype is 'int3'"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must not be negative, got -1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p must be above 0"),
        (["--chat", "--bos"], "brings its own bos token"),
        (["--prompt", "a", "--no-thinking"], "are a chat's: add --chat"),
        (["--chat", "--template-var", "thinking"], "'thinking': give NAME=VALUE"),
        (["--chat", "--template-var", "messages=[]"], "cannot be called 'messages'"),
        (
            ["--chat", "--no-thinking", "--template-var", "enable_thinking=true"],
            "say different things",
        ),
        (["--chat", "--tools", "/dev/zero"], "/dev/zero: is a device"),
        (["--prompt", "a", "--device", "tpu"], "on --device tpu"),
        (["--prompt", "a\ud800"], "half a character"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert cli.main(["generate", str(folder), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


def test_a_checkpoint_without_tokenizer_or_template(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert cli.main(["generate", str(tmp_path), "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_template_is_told_what_the_user_says(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ raise_exception([enable_thinking, a, b, tools[0].name] | string) }}"
    )
    (tmp_path / "tools.json").write_text('[{"name": "look"}]')
    done = run(
        tmp_path, "--chat", "--prompt", "x", "--no-thinking", "--template-var", "a=[1, null]",
        "--template-var", "b=c=d", "--tools", tmp_path / "tools.json",
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith("messages: [False, [1, None], 'c=d', 'look']\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        (None, {}, {"do_sample": True, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 256}),
        ({"temperature": 0.6}, {}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}),
        ({"do_sample": True}, {}, {"do_sample": True, "temperature": 1.0, "top_p": 1.0}),
        ({"do_sample": False}, {}, {"do_sample": False}),
        ({"do_sample": False}, {"top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"do_sample": True, "top_k": 5}, {"temperature": 0.0}, {"do_sample": False, "top_k": 0}),
        ({"max_length": 9}, {}, {"max_length": 9, "max_new_tokens": None}),
        ({"max_length": 9}, {"max_new_tokens": 3}, {"max_length": None, "max_new_tokens": 3}),
        ({"num_return_sequences": 4}, {}, {"num_return_sequences": 1}),
    ],
)
def test_the_user_goes_before_the_file_and_the_file_before_our_defaults(file, given, expected):
    options = GenerationOptions.of(Sampling(**given).options(file), file)
    assert {name: getattr(options, name) for name in expected} == expected
