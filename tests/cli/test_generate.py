"""`nemotron-v3 generate` on a tiny checkpoint with a tokenizer of its own."""

import io
import json
import shutil
import sys
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file

from nemotron_v3.checkpoint import convert, from_pretrained
from nemotron_v3.cli import main as cli
from nemotron_v3.cli.sampling import Sampling
from nemotron_v3.cli.terminal import harmless
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.generation import Chat, ChatTemplate, GenerationOptions, generate
from tests.cli.checkpoint import write_chat_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_chat_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@dataclass
class Done:
    """What a command wrote, and its exit status."""

    stdout: str
    stderr: str
    returncode: int


@pytest.fixture
def run(monkeypatch, capsys):
    """The command, with standard input from a pipe that holds `said`."""

    def run(*arguments, said: str | bytes = "") -> Done:
        raw = said if isinstance(said, bytes) else said.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        status = cli.main(["generate", *map(str, arguments)])
        return Done(*capsys.readouterr(), status)

    return run


def test_a_prompt_is_continued_on_stdout(folder, run):
    done = run(folder, "--prompt", "say what", "--temperature", 0, "--max-new-tokens", 12)
    tokenizer = PretrainedTokenizer.load(folder)
    prompt = tokenizer.encode("say what")
    assert prompt[0] == 0
    out = generate(
        from_pretrained(folder), prompt, tokenizer=tokenizer, max_new_tokens=12,
        eos_token_id=[1, 2],
    )  # fmt: skip
    assert done.stdout == f"say what{harmless(out.text[0])}\n"
    assert done.stderr.startswith(f"{len(out.new_tokens[0])} tokens, ")
    assert done.returncode == 0


def test_a_chat_is_held_on_stdin(folder, run):
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
    assert done.stdout == harmless(f"{answers[0]}\n{answers[1]}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
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
        (["--prompt", "a\ud800"], "half a character"),
        (["--chat", "--system", "a\ud800"], "half a character"),
        (["--prompt", "a", "--stop", "\ud800"], "half a character"),
        (["--prompt", "a", "--seed", str(2**64)], "outside the 64 bits"),
        (["--prompt", "a", "--seed", str(-(2**63) - 1)], "outside the 64 bits"),
        (["--prompt", "a", "--prompt", "b", "--seed", str(2**64 - 1)], "outside the 64 bits"),
        (["--prompt-file", "/nowhere/x"], "/nowhere/x"),
        (["--prompt-file", "/dev/zero"], "is a device"),
        (["--prompt-file", "-", "--prompt-file", "-"], "can be read once"),
        (["--chat", "--prompt-file", "-"], "held on standard input"),
        (["--chat", "--prompt", "a", "--prompt", "b"], "one prompt at most"),
        (["--chat", "--json"], "written to a file by /save"),
        (["--prompt", "a", "--adapter", "/nowhere"], "has no adapter_config.json"),
    ],
)
def test_mistakes_are_one_line(folder, capsys, arguments, message):
    assert cli.main(["generate", str(folder), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1


# Of torch.device: each is there with a backend that this machine may not have.
DEVICES = (
    *("cuda", "cuda:99", "xpu", "mps", "hip", "hpu", "mtia", "xla", "vulkan", "mkldnn", "opengl"),
    *("opencl", "ideep", "ipu", "ve", "fpga", "maia", "lazy", "meta", "privateuseone"),
    *("tpu", "", "cuda:", "cuda:-1", "gpu", "CPU:x", "\ud800"),
)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_is_one_line(folder, capsys, device):
    try:
        torch.empty(1, device=device).cpu()
    except Exception:
        assert cli.main(["generate", str(folder), "--prompt", "a", "--device", device]) == 2
        told = capsys.readouterr().err
        assert "nothing can be computed on --device" in told and told.count("\n") == 1


@pytest.mark.parametrize("dtype", ["bf16", "BFLOAT16", "fp32", "torch.float32", "half", "fp64"])
def test_dtypes_by_every_name(folder, capsys, dtype):
    arguments = ["--prompt", "a", "--dtype", dtype, "--max-new-tokens", "1"]
    assert cli.main(["generate", str(folder), *arguments]) == 0


def continuation(folder, prompt, **options):
    out = generate(
        from_pretrained(folder), prompt, tokenizer=PretrainedTokenizer.load(folder),
        eos_token_id=[1, 2], **options,
    )  # fmt: skip
    return out


def test_prompts_come_from_the_line_from_files_and_from_standard_input(folder, tmp_path, run):
    (tmp_path / "a").write_text("say what\n")
    (tmp_path / "b").write_text("\nmean\n\n")
    greedy = ["--temperature", 0, "--max-new-tokens", 5]
    texts = ["né 日本", "say what", "\nmean\n", "hello"]
    expected = [continuation(folder, [t], max_new_tokens=5).text[0] for t in texts]
    done = run(
        folder, "--prompt", texts[0], "--prompt-file", tmp_path / "a", "--prompt-file",
        tmp_path / "b", "--prompt-file", "-", *greedy, said="hello\n",
    )  # fmt: skip
    shown = [t + e for t, e in zip(texts, expected, strict=True)]
    assert done.stdout == "\n\n".join(map(harmless, shown)) + "\n"
    assert done.stderr.startswith(f"{sum(map(len, _new_ids(folder, texts)))} tokens, ")
    # Without any of them, standard input is the prompt.
    done = run(folder, *greedy, said="hello\n")
    assert done.stdout == harmless(shown[3]) + "\n"


def _new_ids(folder, texts):
    return [continuation(folder, [t], max_new_tokens=5).new_tokens[0] for t in texts]


@pytest.mark.parametrize(
    ("said", "message"),
    [("", "there is nothing to continue: give --prompt TEXT, or --chat"), (b"\xff", "not UTF-8")],
)
def test_standard_input_that_is_no_prompt(folder, run, said, message):
    done = run(folder, said=said)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_json_is_an_object_a_prompt_in_order(folder, capsys):
    texts = ["say what", "né 日本", "mean"]
    options = ["--seed", "3", "--max-new-tokens", "7", "--top-k", "9", "--json"]
    prompts = [word for text in texts for word in ("--prompt", text)]
    assert cli.main(["generate", str(folder), *prompts, *options]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    out = continuation(
        folder, texts, seed=3, max_new_tokens=7, top_k=9, do_sample=True, temperature=0.7,
        top_p=0.95,
    )  # fmt: skip
    assert [row["text"] for row in rows] == list(out.text)
    assert [row["token_ids"] for row in rows] == out.new_tokens
    assert [row["prompt"] for row in rows] == texts
    assert [row["finish_reason"] for row in rows] == list(out.finish_reason)
    assert [row["prompt_tokens"] for row in rows] == list(out.prompt_lengths)


def test_control_characters_of_the_model_are_shown_not_sent(folder, monkeypatch, capsys):
    said = "a\x1b]0;title\x07b\x9b31m\rc\td\n\x7f é 日本"
    monkeypatch.setattr(PretrainedTokenizer, "decode", lambda self, ids: said * bool(len(ids)))
    line = ["generate", str(folder), "--prompt", "x\x1b[2J", "--max-new-tokens", "1"]
    assert cli.main(line) == 0
    shown = capsys.readouterr().out
    assert shown == "x␛[2Ja␛]0;title␇b\\x9b31m␍c\td\n␡ é 日本\n"
    assert cli.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == said


def test_an_adapter_is_merged_into_the_weights(folder, tmp_path, capsys):
    weight = from_pretrained(folder).lm_head.weight
    tensors = {
        "base_model.model.lm_head.lora_A.weight": torch.randn(2, weight.shape[1]),
        "base_model.model.lm_head.lora_B.weight": torch.randn(weight.shape[0], 2),
    }
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    settings = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(settings)
    convert(folder, tmp_path / "merged", adapter=tmp_path / "adapter")
    options = ["--prompt", "say", "--temperature", "0", "--max-new-tokens", "9", "--json"]
    shown = []
    for path, more in (
        (folder, ["--adapter", str(tmp_path / "adapter")]),
        (tmp_path / "merged", []),
        (folder, []),
    ):
        assert cli.main(["generate", str(path), *options, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != shown[2]


def test_a_checkpoint_without_tokenizer_or_template(folder, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert cli.main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert cli.main(["generate", str(tmp_path), "--chat"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_the_template_is_told_what_the_user_says(folder, tmp_path, run):
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
