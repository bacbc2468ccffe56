"""A run from its configuration to its checkpoint."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from nemotron_v3.data.options import DataOptions
from nemotron_v3.data.packed import PackedData
from nemotron_v3.data.pieces import PackedRow
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.data.tokenizer import Tokenizer
from nemotron_v3.layers.moe.load_balancing import ExpertLoad
from nemotron_v3.model.cost import parameters
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.pages.live import LiveReport
from nemotron_v3.train.build import Adapters, build_model, read_model_config
from nemotron_v3.train.checkpoints import Checkpoints
from nemotron_v3.train.details import look
from nemotron_v3.train.display import Display
from nemotron_v3.train.ends import Ends, settle_ends
from nemotron_v3.train.export import export
from nemotron_v3.train.finite import first_not_finite
from nemotron_v3.train.folder import check_folder, write_about, write_outcome
from nemotron_v3.train.interrupts import Stopped, noted_signals
from nemotron_v3.train.loop import Data, NotFinite, Progress, Step, Trainer, validation_loss
from nemotron_v3.train.metrics import Recorder, check_log, peak_flops
from nemotron_v3.train.muon import Muon
from nemotron_v3.train.optimizers import make_optimizer
from nemotron_v3.train.options import TrainOptions
from nemotron_v3.train.passes import passes_at_once
from nemotron_v3.train.processes import World, processes, rows_of
from nemotron_v3.train.samples import Continue, Samples
from nemotron_v3.train.schedule import make_scheduler
from nemotron_v3.train.threads import thread_choice
from nemotron_v3.train.tokenizer import read_tokenizer, with_template

MakeData = Callable[[DataOptions, Any, int, int], Data]


@dataclass(frozen=True)
class Length:
    """How long a training is: `steps`, or `seconds` of steps by the clock."""

    steps: int | None = None
    seconds: float | None = None

    def before(self, step: int, seconds: float) -> float:
        """The part that is behind the middle of the step after `step` ones, as far as the clock
        lets it be foreseen."""
        if self.steps is not None:
            return (step + 0.5) / self.steps
        return seconds * (step + 0.5) / max(step, 1) / self._clock()

    def done(self, progress: Progress) -> float:
        """The part that is behind us."""
        if self.steps is not None:
            return progress.step / self.steps
        return progress.seconds / self._clock()

    def _clock(self) -> float:
        if self.seconds is None:
            raise ValueError("a training without steps needs seconds")
        return self.seconds


@dataclass(frozen=True)
class HeldOut:
    """Rows that are not trained on, by pass, and the largest token of their sources."""

    passes: list[list[PackedRow]]
    largest_token: int

    def digest(self) -> str:
        """The same for the same rows."""
        found = hashlib.blake2b(digest_size=8)
        for row in (row for rows in self.passes for row in rows):
            found.update(row.input_ids.numpy().tobytes() + row.labels.numpy().tobytes())
        return found.hexdigest()


def train(
    options: TrainOptions,
    *,
    resume: bool = False,
    adapters: Adapters | None = None,
    tokenizer: Any = None,
    write_on: Continue | None = None,
    make_data: MakeData = PackedData,
    display: Display | None = None,
    after_step: Callable[[Step], None] | None = None,
    export_if_stopped: bool = False,
) -> Progress:
    """Train what `options` ask for, and leave a checkpoint in `options.out`.

    Under torchrun every process calls it. The first SIGINT or SIGTERM lets the step at hand finish
    and saves.

    Args:
        options: the whole configuration.
        resume: go on with the run in `options.out`.
        adapters: who puts LoRA on a model: `nemotron_v3.hf.lora`.
        tokenizer: in place of the one that the options name.
        write_on: who continues the prompts of `log.samples`.
        make_data: rows of (options, tokenizer, rank, processes).
        display: who tells the user; None speaks on stderr.
        after_step: told of every step, on every process.
        export_if_stopped: leave a checkpoint also where a signal came.

    Raises:
        ValueError: options that cannot be, before anything is written; a step without targets.
        NotFinite: a step made NaN; what was good is saved, and the message names the module.
        Stopped (a KeyboardInterrupt): a signal came; the run is saved.
        OSError: the disk refuses; the saves before are as they were.
    """
    options.check()
    check_log(options.log)
    if options.log.samples and write_on is None:
        raise ValueError(
            "log.samples need somebody who continues prompts (write_on): leave them out"
        )
    part = rows_of(options.plan.cp)
    check_folder(options.out, resume)
    tokenizer = read_tokenizer(options) if tokenizer is None else tokenizer
    options = with_template(options)
    ends = None
    if isinstance(tokenizer, Tokenizer | PretrainedTokenizer):
        config = read_model_config(options.model, torch.device("cpu"))
        ends = settle_ends(options, config, tokenizer)
    # Before the processes meet: the first one tokenises, which may take longer than they wait.
    data = make_data(options.data, tokenizer, *part)
    held_out = _validation(options, tokenizer, make_data, *part)
    length = length_of(options, data)
    with processes(options.model.device, options.plan.cp) as world, noted_signals() as signal:
        display = Display() if display is None else display
        display.speaks = world.first
        run = _Run(options, world, data, held_out, length, display, adapters)
        run.ends = ends
        if options.log.samples and write_on is not None:
            run.samples = Samples(
                options.out, options.log, write_on, tokenizer, display.say, world.first
            )
        with run.told_end():
            run.prepare(resume, signal)
            progress = run.go(after_step)
            stopped = run.trainer.signalled
            if export_if_stopped or not stopped:
                export(run.trainer.model, options, world, adapters, tokenizer)
            if stopped:
                where = f"saved after step {progress.step:,} in {options.out}: --resume goes on"
                raise Stopped(stopped, where)
        display.say(f"saved: {options.out}")
        return progress


def _validation(
    options: TrainOptions, tokenizer: Any, make_data: MakeData, rank: int, size: int
) -> HeldOut:
    """The rows of this process, by passes that all processes make together."""
    asked = options.validation
    if not asked.sources:
        return HeldOut([], -1)
    rows = min(options.data.rows, asked.rows)
    held_out = replace(options.data, sources=asked.sources, epochs=1.0, rows=rows)
    steps: list[list[PackedRow]] = []
    data = make_data(held_out, tokenizer, rank, size)
    for step in data:
        steps.append(step)
        if len(steps) * rows >= asked.rows:
            break
    if not steps:
        raise ValueError("validation.sources hold nothing to measure")
    return HeldOut(steps, data.largest_token)


def length_of(options: TrainOptions, data: Data | None) -> Length:
    """How long a training is; without `data` as its schedule alone says.

    Raises:
        ValueError: a training without an end, or one that is longer than its data.
    """
    schedule = options.schedule
    if schedule.minutes is not None:
        return Length(seconds=60 * schedule.minutes)
    steps = schedule.steps
    if schedule.tokens is not None:
        steps = math.ceil(schedule.tokens / (options.data.tokens_per_row * options.data.rows))
    there = None if data is None else data.total_steps(steps)
    if steps is None and there is None:
        raise ValueError(
            "the training has no end: give schedule.steps, tokens or minutes, or data.epochs"
        )
    if steps is not None and there is not None and there < steps:
        raise ValueError(
            f"the data ends after {there:,} steps (data.epochs = {options.data.epochs:g}), before "
            f"the {steps:,} of the schedule: give fewer, or data.epochs = inf for no end"
        )
    return Length(steps=steps if steps is not None else there)


class _Run:
    """The parts of a run, and the order of their work."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        data: Data,
        held_out: HeldOut,
        length: Length,
        display: Display,
        adapters: Adapters | None,
    ):
        self.options, self.world, self.data = options, world, data
        self.held_out, self.length = held_out, length
        self.display, self.adapters = display, adapters
        self._saved = time.monotonic()
        self.page: LiveReport | None = None  # until the folder is this run's
        self.samples: Samples | None = None
        self.ends: Ends | None = None

    def prepare(self, resume: bool, signal: Callable[[], int]) -> None:
        """Model, optimiser and what was saved."""
        options, world = self.options, self.world
        model, called = build_model(options, world, self.adapters)
        largest = max(self.data.largest_token, self.held_out.largest_token)
        if largest >= model.config.vocab_size:
            raise ValueError(
                f"the tokenizer gives token {largest}, and the model has "
                f"{model.config.vocab_size}: they do not belong together"
            )
        optimizer = make_optimizer(model, options.optimizer, options.seed)
        passes = passes_at_once(options.memory, world)
        if passes is not None and isinstance(optimizer, Muon):
            optimizer.each = passes.each
        self.checkpoints = Checkpoints(
            options.out, model, optimizer, world, options.save, self._identity(model)
        )
        self._take_ends(model)
        progress = (self.checkpoints.load() if resume else None) or Progress()
        if progress.step:
            self.data.load_state_dict(progress.data)
        self._compare_held_out(progress)
        if world.first:  # only now, when nothing refuses any more
            about = write_about(options, resume)
        progress.data = self.data.state_dict()
        length = self.length
        scheduler = make_scheduler(
            optimizer,
            options.schedule,
            options.optimizer.learning_rate,
            lambda step: length.before(step, progress.seconds),
            progress.step,
        )
        load = None
        if options.log.details or options.optimizer.balance:
            load = ExpertLoad(model) if model.config.has_experts else None
        self.trainer = Trainer(
            options,
            world,
            model,
            called,
            optimizer,
            scheduler,
            load,
            progress,
            look,
            signal,
            passes,
        )
        self.recorder = None
        if self.samples is not None:
            self.samples.open(progress.step)
        if world.first:
            self.page = LiveReport(options.out, options.log.report, self.display.say)
            name = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
            peak = peak_flops(name, options.log.peak_tflops)
            peak = None if peak is None else peak * world.size
            self.recorder = Recorder(
                options.out, options.log, model.config, progress.step, peak, about
            )
        self._introduce(model, progress)

    def _take_ends(self, model: NemotronV3ForCausalLM) -> None:
        """Tell the model which tokens begin, end and fill up its texts."""
        if self.ends is None:
            return
        before, config = model.config, model.config.replace(**self.ends.config)
        for module in (model, model.model):
            assert module.config is before, "a model and its body share a config"
            module.config = config
        said = self.ends.generation_config
        model.generation_config = None if said is None else dict(said)

    def _compare_held_out(self, progress: Progress) -> None:
        """Forget the best loss where it is of other rows than those that are held out now."""
        before, now = progress.held_out, self.world.told(self.held_out.digest())
        progress.held_out = now
        if before not in (None, now) and progress.best_step is not None:
            self.display.say(
                f"validation: other rows than before are held out; the loss of step "
                f"{progress.best_step:,} is not compared with theirs"
            )
            progress.best_loss = progress.best_step = progress.validated = None

    def _identity(self, model: NemotronV3ForCausalLM) -> dict[str, str]:
        """What a run that goes on has to share with the one that it goes on with."""
        sizes = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        lora, asked = self.options.lora, self.options.optimizer
        moments = {"8bit": "8bit by rows"}.get(asked.moments, asked.moments)
        state = f"{moments} moments, {asked.bf16_weights} bf16 weights"
        return {
            "the model's config": hashlib.sha256(sizes.encode()).hexdigest()[:16],
            "the weights' dtype": str(model.model.embeddings.weight.dtype),
            "lora": json.dumps(asdict(lora)),
            "the optimiser's state": f"muon, {state}" if asked.kind == "muon" else state,
            "the trained parameters": f"{sum(p.numel() for p in _trained(model)):,}",
        }

    def _introduce(self, model: NemotronV3ForCausalLM, progress: Progress) -> None:
        count = parameters(model.config)
        trained = sum(parameter.numel() for parameter in _trained(model))
        say = self.display.say
        for warning in () if self.ends is None else self.ends.warnings:
            say(f"warning  {warning}")
        for line in self.data.report().lines():
            say(f"data     {line}")
        say(f"model    {count.total:,} parameters, {count.active:,} a token, {trained:,} trained")
        length = self.length
        if length.seconds is None:
            told = f"{length.steps:,} steps"
        else:
            told = f"{length.seconds / 60:g} minutes"
        say(f"length   {told} of {self.options.data.rows} rows")
        if progress.step:
            say(f"resumed  after step {progress.step:,}")

    def go(self, after_step: Callable[[Step], None] | None) -> Progress:
        """The loop; ends with a save."""
        trainer, progress = self.trainer, self.trainer.progress
        with ExitStack() as stack:
            if self.recorder is not None:
                stack.callback(self.recorder.close)
            if self.samples is not None:
                stack.callback(self.samples.close)
            if trainer.load is not None:
                stack.enter_context(trainer.load)
            stack.enter_context(self.display.training())
            threads = None
            if trainer.passes is not None:
                stack.enter_context(trainer.passes.sharing())
            elif self.world.size == 1:
                threads = thread_choice(self.length.seconds is not None, self.world.device)
            if threads is not None:
                stack.callback(torch.set_num_threads, threads.current)
            try:
                for step in self._steps():
                    if threads is not None:
                        threads.note(step.tokens, step.seconds)
                    if after_step is not None:
                        after_step(step)
            except NotFinite as error:
                self._stop_at_nan(error)
            except BaseException:
                # A save that was under way counts; other processes that it needs may be dead.
                with suppress(Exception, CheckpointException):
                    self.checkpoints.finish(seconds=60)
                raise
            if not trainer.signalled:
                self._measure()
            self.checkpoints.save(progress)
            self.checkpoints.finish()
        self.world.wait()
        return progress

    @contextmanager
    def told_end(self) -> Iterator[None]:
        """Within it, say in the run's folder how it ended, and show it on its page."""
        outcome = "finished"
        try:
            yield
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}".rstrip(": ")
            raise
        finally:
            if self.page is not None:
                # A disk that is full now has failed the run already, and no word on how it ended is
                # worth what it has trained.
                with suppress(OSError, ValueError):
                    write_outcome(self.options.out, outcome)
                if page := self.page.end():
                    self.display.say(f"page: {page}")

    def _steps(self) -> Iterator[Step]:
        trainer, progress = self.trainer, self.trainer.progress
        for step in trainer.steps(self.data, lambda: self.length.done(progress) >= 1):
            mfu = None
            if self.recorder is not None:
                self.recorder.step(step, progress.data)
                mfu = self.recorder.utilisation(step)
            if self.page is not None:
                self.page.step()
            self.display.step(step, self.length.done(progress), progress.seconds, mfu)
            self.checkpoints.poll()
            if step.step % self.options.validation.every == 0:
                self._measure()
            if self._saves_at(step.step):
                self.checkpoints.save(progress)
                self._saved = time.monotonic()
            yield step

    def _saves_at(self, step: int) -> bool:
        save = self.options.save
        if save.every and step % save.every == 0:
            return True
        if save.minutes is None:
            return False
        return self.world.told(time.monotonic() - self._saved > 60 * save.minutes)

    def _measure(self) -> None:
        """The model as it is: its validation loss, and what it writes."""
        self._validate()
        if self.samples is not None:
            self.samples.take(self.trainer.model, self.trainer.progress.step)

    def _validate(self) -> None:
        progress = self.trainer.progress
        if not self.held_out.passes or progress.validated == progress.step:
            return
        rows = self.options.memory.rows_per_pass
        loss = validation_loss(self.trainer.model, self.held_out.passes, rows, self.world)
        progress.validated = progress.step
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, progress.step
            if self.options.save.keep_best:
                self.checkpoints.save(progress)
        if self.recorder is not None:
            self.recorder.write({"step": progress.step, "validation_loss": loss})
        self.display.say(f"step {progress.step:,}  validation loss {loss:.4f}")

    def _stop_at_nan(self, error: NotFinite) -> None:
        """Save what is good, and say which module made what is not."""
        trainer = self.trainer
        self.checkpoints.save(trainer.progress)
        self.checkpoints.finish()
        made = first_not_finite(
            trainer.model, trainer.called, error.batches, error.items, error.seed, self.world
        )
        error.args = (
            f"{error.args[0]}; the first that is not finite is {made}. Nothing was updated with "
            f"it: step {trainer.progress.step} is saved in {self.options.out}",
        )
        raise error


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
