"""`nemotron-v3 train`: one's own data, from a configuration to a checkpoint."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from nemotron_v3.cli.quiet import quiet_imports
from nemotron_v3.cli.threads import settle_threads
from nemotron_v3.data.options import DataOptions, Source
from nemotron_v3.train.options import TrainOptions

CONFIG = "train.toml"
_SWITCHES = ("--resume", "--dry-run")  # options without a value


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train on one's own text or chats: from scratch, further, or adapters alone.

    RECIPE is a TOML file, or the folder of a run, whose configuration is taken; what is given
    beside it goes over it. Under torchrun all processes share the model.
    """

    recipe: tyro.conf.Positional[Path | None] = None
    """a TOML file, or the folder of a run"""
    files: tuple[str, ...] = ()
    """what to train on, in place of the recipe's sources: files, folders or globs of text, JSONL or
    Parquet"""
    resume: bool = False
    """go on with the run in --out, or in the folder that is given in the recipe's place"""
    dry_run: bool = False
    """show what the run would take, and do nothing"""
    mfu: float = 0.4
    """of a dry run: the part of the device's peak that is reached"""
    threads: int | None = None
    """of a CPU; else all cores"""
    options: Annotated[TrainOptions, tyro.conf.arg(name="")]
    read: tyro.conf.Suppress[tuple[Path | None, tuple[str, ...]]] = (None, ())
    """the recipe and the files that `options` come from"""

    @classmethod
    def defaults(cls, args: Sequence[str]) -> "Train":
        """What holds where nothing else is given: the recipe that is named in the arguments.

        Raises:
            ValueError: it cannot be read.
        """
        from nemotron_v3.train.config_file import read_config

        recipe, files = read = _named(args)
        over: dict[str, Any] = {}
        if files:
            over = {"data": {"sources": [{"path": path} for path in files]}}
        if recipe is None:
            sources = tuple(Source(path) for path in files or ["FILE"])
            data = DataOptions(sources=sources, tokens_per_row=1024, rows=8)
            return cls(options=TrainOptions(data=data), read=read)
        if not recipe.exists():
            raise ValueError(f"{recipe} does not exist: give a TOML file, or the folder of a run")
        if recipe.is_dir():
            if not (recipe / CONFIG).exists():
                raise ValueError(f"{recipe} holds no run: there is no {CONFIG} in it")
            options = read_config(recipe / CONFIG, TrainOptions, over)
            return cls(options=replace(options, out=recipe), read=read)
        if recipe.suffix != ".toml":
            raise ValueError(
                f"{recipe} is no recipe, which is a .toml file: to train on it give "
                f"--files {recipe}"
            )
        return cls(options=read_config(recipe, TrainOptions, over), read=read)

    def run(self) -> None:
        """Train, or show the plan."""
        if self.read != (self.recipe, self.files):
            raise ValueError(
                "the recipe is read where it stands first, and --files with a blank behind it: "
                "nemotron-v3 train RECIPE --files A B"
            )
        if self.recipe is None and not self.files:
            raise ValueError("there is nothing to train on: give a recipe, or --files")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads is {self.threads}: give at least 1")
        settle_threads(self.threads)
        if self.dry_run:
            from nemotron_v3.train.plan import show_plan

            show_plan(self.options, self.mfu)
            return
        from nemotron_v3.train.interrupts import Stopped
        from nemotron_v3.train.run import train

        try:
            adapters = _adapters(self.options)
            train(self.options, resume=self.resume, adapters=adapters, write_on=_write_on)
        except Stopped as stopped:
            print(f"nemotron-v3: interrupted: {stopped}", file=sys.stderr)
            sys.exit(128 + stopped.number)


def _named(args: Sequence[str]) -> tuple[Path | None, tuple[str, ...]]:
    """The recipe and the files that stand in the arguments, before they are read for good.

    What stands first is the recipe, switches apart; elsewhere it is told by its ending.
    """
    if list(args).count("--files") > 1:
        raise ValueError("--files stands there twice: give all files behind one, --files A B")
    files: tuple[str, ...] = ()
    recipe = None
    for i, arg in enumerate(args):
        before = args[i - 1] if i else ""
        first = all(each in _SWITCHES for each in args[:i])
        if arg == "--files":
            given = args[i + 1 :]
            stop = next((n for n, each in enumerate(given) if each.startswith("--")), len(given))
            files = tuple(given[:stop])
        elif recipe is None and not arg.startswith("-"):
            named = arg.endswith(".toml") and (before in _SWITCHES or not before.startswith("--"))
            recipe = Path(arg) if first or named else None
    return recipe, files


def _write_on(model: Any, prompts: Sequence[str], tokens: int, tokenizer: Any) -> list[str]:
    """The texts that a model in training puts behind prompts: its likeliest tokens.

    A model that is spread over processes is called equally often on each of them: what ends a text
    does not end its pass, for a rounding might let one process choose another token.
    """
    from nemotron_v3.generation import GenerationOptions, generate
    from nemotron_v3.generation.stopping import Row
    from nemotron_v3.train.samples import is_spread

    asked: dict[str, Any] = {"max_new_tokens": tokens, "tokenizer": tokenizer, "do_sample": False}
    if not is_spread(model):
        found = [generate(model, prompt, **asked).text for prompt in prompts]
        return [text[0] for text in found if text is not None]  # there is a tokenizer, so a text
    chosen = GenerationOptions.of(asked, model.generation_config)
    endless: dict[str, Any] = {**asked, "eos_token_id": [], "stop_strings": []}
    texts = []
    for prompt in prompts:
        row = Row(chosen.eos(model.config), tokens, tokenizer, chosen.stops)
        out = generate(model, prompt, **endless)
        new = out.sequences[0, int(out.prompt_lengths[0]) :].tolist()
        while row.finish_reason is None:
            row.push(new[len(row.tokens)])
        texts.append(row.text)
    return texts


def _adapters(options: TrainOptions) -> Any:
    """Who puts LoRA on a model; None where none is asked for."""
    if not options.lora.rank:
        return None
    try:
        with quiet_imports():
            from nemotron_v3.hf import lora
    except ImportError as error:
        raise ValueError(
            f"LoRA needs PEFT and transformers ({error}): pip install 'nemotron-v3[hf]'"
        ) from None
    return lora
