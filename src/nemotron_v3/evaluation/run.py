"""An evaluation from what it is asked to its result: several checkpoints, one after the other."""

import contextlib
import gc
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.chat.template import template_folder
from nemotron_v3.checkpoint import from_pretrained, merge_adapter, open_checkpoint
from nemotron_v3.checkpoint.audit import read_config
from nemotron_v3.config import NemotronV3Config
from nemotron_v3.config.versions import installed
from nemotron_v3.data.encode import Encoder
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.store import TokenStore
from nemotron_v3.data.tokenize import cache_folder, open_store
from nemotron_v3.evaluation.journal import Journal, folder_of
from nemotron_v3.evaluation.options import Candidate, EvalOptions
from nemotron_v3.evaluation.result import CheckpointResult, Evaluation, TextResult
from nemotron_v3.evaluation.streaming import Scorer
from nemotron_v3.evaluation.tasks import open_tasks, run_tasks
from nemotron_v3.evaluation.texts import (
    Circumstances,
    Interrupted,
    Tell,
    check_tokens,
    score_source,
    text_result,
    unique_names,
)
from nemotron_v3.model.cost import parameters
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.interrupts import Stopped, noted_signals
from nemotron_v3.train.processes import World, processes, rank_and_size

PACKAGES = ("nemotron-v3", "torch", "triton", "safetensors", "tokenizers", "lm_eval")


def evaluate(
    candidates: Sequence[Candidate],
    options: EvalOptions,
    out: Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    tell: Tell | None = None,
) -> Evaluation | None:
    """Measure checkpoints on the same sources and tasks.

    Under torchrun every process calls it, each has the whole model, and documents and requests are
    dealt to them. The first SIGINT or SIGTERM ends it behind the pass at hand.

    Args:
        candidates: the checkpoints.
        options: what is measured.
        out: a JSON file to write. Until it is whole, what was measured is in a folder beside it.
        resume: go on with what an interrupted evaluation left beside `out`.
        overwrite: replace `out`.
        tell: told of the progress.

    Returns:
        What was found; None on all processes but the first.

    Raises:
        ValueError: checkpoints, sources or tasks that cannot be read, before anything is computed;
            a journal of another evaluation.
        Stopped (a KeyboardInterrupt): a signal came.
        OSError: the disk refuses.
    """
    if not candidates:
        raise ValueError("there is no checkpoint to evaluate: give at least one folder")
    rank, _ = rank_and_size()
    journal = Journal(None if out is None else folder_of(out), rank)
    _check_out(out, overwrite, resume)
    tell = tell if tell is not None and rank == 0 else _silent
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manager = None if options.tasks is None else open_tasks(options.tasks)
    with contextlib.ExitStack() as stack:
        # Before the processes meet: the first one tokenises, which may take longer than they wait.
        subjects = [stack.enter_context(_opened(each, options, tell)) for each in candidates]
        if rank == 0:
            journal.open(_identity(subjects, options), resume)
        world = stack.enter_context(processes(options.device))
        signal = stack.enter_context(noted_signals())
        around = Circumstances(world, journal, lambda: bool(signal()), tell)
        try:
            results = _measure_all(subjects, options, manager, around)
        except Interrupted:
            raise _stopped(signal(), out) from None
        told = Evaluation(
            sources=[_told_source(source) for source in options.sources],
            checkpoints=results,
            started=started,
            options=_told_options(options),
            versions=installed(PACKAGES) | {"python": platform.python_version()},
        )
        if world.first and out is not None:
            told.write(out)
            journal.close()
        return told if world.first else None


def score_texts(
    model: NemotronV3ForCausalLM,
    tokenizer: Any,
    options: EvalOptions,
    *,
    cache: Path | None = None,
) -> list[TextResult]:
    """The scores of a model in memory on `options.sources`, in this process.

    Args:
        model: the model, in the mode (`eval()`) it is to run in.
        tokenizer: a `PretrainedTokenizer`, or the demo's `Tokenizer`.
        options: of which sources, window, bos, chats and workers count.
        cache: a folder for the tokens; None is the usual one.

    Raises:
        ValueError, OSError: see `evaluate`.
    """
    encoder = _encoder(tokenizer, options, model.config)
    around = Circumstances(World(0, 1, model.model.embeddings.weight.device), Journal(None, 0))
    with _stores(encoder, options, model.config.vocab_size, _silent, cache) as stores:
        return _texts(model, encoder, stores, options, "", "", around)


@dataclass
class _Subject:
    """A candidate with what is known of it before its model is in memory."""

    candidate: Candidate
    config: NemotronV3Config
    encoder: Encoder | None
    stores: list[TokenStore]


@contextlib.contextmanager
def _opened(candidate: Candidate, options: EvalOptions, tell: Tell) -> Iterator[_Subject]:
    """Read all of a candidate but its weights."""
    config = read_config(open_checkpoint(candidate.path))
    if candidate.adapter is not None and not candidate.adapter.is_dir():
        raise ValueError(f"{candidate.adapter} is no folder of an adapter")
    with contextlib.ExitStack() as stack:
        encoder, stores = None, []
        if options.sources:
            told = options
            folder = template_folder(candidate.path, candidate.adapter)
            if options.chat_template is None and _has_template(folder):
                told = replace(options, chat_template=str(folder))
            encoder = _encoder(PretrainedTokenizer.load(candidate.path), told, config)
            stores = stack.enter_context(_stores(encoder, options, config.vocab_size, tell))
        yield _Subject(candidate, config, encoder, stores)


@contextlib.contextmanager
def _stores(
    encoder: Encoder,
    options: EvalOptions,
    vocab_size: int,
    tell: Tell,
    cache: Path | None = None,
) -> Iterator[list[TokenStore]]:
    """The tokens of every source."""
    with contextlib.ExitStack() as stack:
        opened = []
        for source in options.sources:
            label = f"tokens of {source.path}"
            store, _ = open_store(
                source,
                encoder,
                options.workers,
                cache_folder() if cache is None else cache,
                lambda done, total, label=label: tell(label, done, total),
            )
            stack.callback(store.close)
            check_tokens(store, source, vocab_size)
            opened.append(store)
        yield opened


def _measure_all(
    subjects: Sequence[_Subject], options: EvalOptions, manager: Any, around: Circumstances
) -> list[CheckpointResult]:
    names = unique_names([_spelling(subject.candidate) for subject in subjects])
    results = []
    for number, (subject, name) in enumerate(zip(subjects, names, strict=True)):
        world, journal = around.world, around.journal
        result = world.told(journal.finished(number) if world.first else None)
        if result is None:
            result = _measure(subject, name, number, options, manager, around)
            if world.first:
                alone = Evaluation([], [result], "", {}, {})
                journal.finish(number, alone.to_dict()["checkpoints"][0])
        results.append(result)
    return results


def _measure(
    subject: _Subject,
    name: str,
    number: int,
    options: EvalOptions,
    manager: Any,
    around: Circumstances,
) -> CheckpointResult:
    """The result of one checkpoint, whose model is in memory only here."""
    candidate, device = subject.candidate, around.world.device
    around.tell(f"loading {name}", 0, 1)
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = from_pretrained(candidate.path, dtype, device)
    if candidate.adapter is not None:
        merge_adapter(model, candidate.adapter)
    around.tell(f"loading {name}", 1, 1)
    size, started = parameters(model.config), time.perf_counter()
    whole = not around.journal.begun(number)
    result = CheckpointResult(
        name=name,
        path=str(candidate.path),
        adapter=None if candidate.adapter is None else str(candidate.adapter),
        dtype=str(model.model.embeddings.weight.dtype).removeprefix("torch."),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        parameters=size.total,
        parameters_active=size.active,
    )
    if subject.encoder is not None:
        key = f"{number}-"
        result.texts = _texts(
            model, subject.encoder, subject.stores, options, key, f"{name}: ", around
        )
    if options.tasks is not None:
        window = options.window
        run_tasks(model, candidate, options.tasks, manager, window, result, number, around)
    result.seconds = time.perf_counter() - started if whole else None
    del model
    gc.collect()
    return result


def _texts(
    model: NemotronV3ForCausalLM,
    encoder: Encoder,
    stores: Sequence[TokenStore],
    options: EvalOptions,
    key: str,
    label: str,
    around: Circumstances,
) -> list[TextResult]:
    scorer, results = Scorer(model, options.window), []
    for number, store in enumerate(stores):
        told = f"{label}{options.sources[number].path}"
        tally = score_source(scorer, store, f"{key}{number}", told, around)
        results.append(text_result(number, store, encoder, tally))
    return results


def _encoder(tokenizer: Any, options: EvalOptions, config: NemotronV3Config) -> Encoder:
    """Documents as in training, with a bos token before them where that was asked for."""
    encoder = Encoder.of(tokenizer, options.chat_template, options.train_on)
    if not options.bos:
        return encoder
    if config.bos_token_id is None:
        raise ValueError("the config names no bos token: leave bos out")
    if encoder.before:
        return encoder
    return replace(encoder, before=(config.bos_token_id,))


def _has_template(folder: Path) -> bool:
    try:
        ChatTemplate.load(folder)
    except ValueError:
        return False  # the data says what is wrong, if there are chats
    return True


def _check_out(out: Path | None, overwrite: bool, resume: bool) -> None:
    if out is None:
        if resume:
            raise ValueError("an evaluation goes on beside its file: give out too")
        return
    if not out.parent.is_dir():
        raise ValueError(f"{out.parent} is no folder: make it, or give another file to write to")
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists: give another name, or overwrite it (--overwrite)")


def _identity(subjects: Sequence[_Subject], options: EvalOptions) -> dict[str, Any]:
    """What decides about the figures."""
    stores = [
        [[file.name, file.digest] for file in store.about.files]
        for subject in subjects
        for store in subject.stores
    ]
    files = {}
    for subject in subjects:
        for folder in filter(None, (subject.candidate.path, subject.candidate.adapter)):
            for path in sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*config.json")):
                found = os.stat(path)
                files[str(path)] = [found.st_size, found.st_mtime_ns]
    return {
        "checkpoints": [_spelling(subject.candidate) for subject in subjects],
        "their files": files,
        "sources": [_told_source(source) for source in options.sources],
        "their tokens": stores,
        "options": _told_options(options),
    }


def _spelling(candidate: Candidate) -> str:
    path = str(candidate.path)
    return path if candidate.adapter is None else f"{path} + {candidate.adapter}"


def _told_source(source: Any) -> dict[str, Any]:
    return {n: v for n, v in asdict(source).items() if n != "weight"}


def _told_options(options: EvalOptions) -> dict[str, Any]:
    told = {n: v for n, v in asdict(options).items() if n not in ("sources", "device", "workers")}
    if options.tasks is not None:
        told["tasks"] = {n: str(v) if isinstance(v, Path) else v for n, v in told["tasks"].items()}
    return told


def _stopped(number: int, out: Path | None) -> Stopped:
    where = "nothing was written: with --out an evaluation can be resumed"
    if out is not None:
        where = f"what was measured is in {folder_of(out)}: --resume goes on"
    return Stopped(number or 2, where)


def _silent(_what: str, _done: int, _total: int) -> None: ...
