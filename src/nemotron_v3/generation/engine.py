"""Prefill, then one token a row and step, until every row has ended.

Letters: R rows, V vocabulary, T packed tokens.

Between two steps a row's cache holds all of the row's tokens but the last, which is fed next. Rows
that have ended leave the batch: their part of the cache is set aside as it is, so that at the end
the cache holds of every row exactly what the row's result says.

On an accelerator the host would have to wait for every token to see whether it ends a row. So steps
go in segments, and the host looks once a segment. A row that ended inside one was fed some tokens
too many, and a recurrent state cannot be unfed: its cache is taken from a copy made when the
segment began, and fed the tokens that count. A step that is a CUDA graph knows the tokens that end
a row and feeds nothing behind them; rows that ended stay in their slots until the others fit a
smaller graph.
"""

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nemotron_v3.cache import NemotronHybridCache, WayBack
from nemotron_v3.generation.cpu_decode import DecodeStep, Reading
from nemotron_v3.generation.graphs import GraphStep, say_once, why_not
from nemotron_v3.generation.graphs.graph import row_slots
from nemotron_v3.generation.graphs.step import AHEAD
from nemotron_v3.generation.options import GenerationOptions
from nemotron_v3.generation.output import GenerationOutput, StreamedToken
from nemotron_v3.generation.prompts import read_prompts, unfed_of
from nemotron_v3.generation.sampling import NO_TOKEN, Sampler
from nemotron_v3.generation.segment import Segment
from nemotron_v3.generation.stopping import Row
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import outside_inference_mode
from nemotron_v3.model.protocol import CausalLM
from nemotron_v3.model.vocabulary import vocabulary_of

_log = logging.getLogger("nemotron_v3")

_OPEN = (
    "a stream over the cache is still open, and the cache behind what it has yielded: exhaust "
    "or close() the iterator first"
)
_STOPPED = (
    "generation was interrupted within a step, and the cache may hold tokens that nobody was "
    "given: restore a snapshot, or make a new cache"
)
_NOT_GATHERED = (
    "generation has ended, but its rows could not be put into the cache, such as for want of "
    "memory: restore a snapshot, or make a new cache"
)
STEPS_AT_ONCE = 16  # between two looks of the host, on an accelerator


def generate(
    model: CausalLM,
    input_ids: Any,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: NemotronHybridCache | None = None,
    **options: Any,
) -> GenerationOutput:
    """Continue every prompt until an eos token, a stop string, or `max_new_tokens`.

    Args:
        model: the model, in the mode (`eval()`) it is to run in.
        input_ids: integers `[R, S]` or `[S]`; a list of ints, or of rows of different lengths; with
            a tokenizer a text, or a list of texts.
        attention_mask: `[R, S]`, 1 = real and 0 = padding, on any side of each row.
        past_key_values: a cache of what each prompt begins with, updated in place: `input_ids` are
            the whole sequences, and what the cache holds of them is not fed again. With
            `num_return_sequences` above 1 it ends up holding the prompts, and the output has a
            cache of its own. Until the first token is there its mamba states are kept once more:
            whatever fails before leaves it as it was before the present piece of the prompts.
        **options: see `GenerationOptions`. One that is not given is what `model.generation_config`
            says.

    Raises:
        ValueError: an empty prompt, a token outside the vocabulary, an option out of range, a cache
            of another config, batch or dtype, or too short a one; a generation config that cannot
            be obeyed. The cache is untouched then.
        TypeError: an unknown option.
        FloatingPointError: logits that are NaN or infinite, of which no token can be chosen.
    """
    chosen = GenerationOptions.of(options, model.generation_config)
    run = _Run(model, input_ids, attention_mask, past_key_values, chosen)
    for _ in run.tokens():
        pass
    return run.output()


def stream(
    model: CausalLM,
    input_ids: Any,
    attention_mask: Tensor | None = None,
    *,
    past_key_values: NemotronHybridCache | None = None,
    **options: Any,
) -> Generator[StreamedToken, None, None]:
    """Like `generate`, token by token as they come: in each step one for every row not yet ended.

    Arguments and errors are `generate`'s. Errors come at the call, but for logits that are not
    finite.

    A cache given holds, once the iterator is exhausted or closed (a `break` out of a `for` loop
    closes it, as `close()` does), what `generate` would leave: of each row the prompt and the
    tokens that were yielded, but the last. Left between the tokens of one step, the rows whose
    token of that step had not come yet have none that is unfed: all of theirs are held. An
    iterator that was never begun leaves the cache as it was. While it is open the cache may be
    behind, and then refuses to be used.
    """
    chosen = GenerationOptions.of(options, model.generation_config)
    run = _Run(model, input_ids, attention_mask, past_key_values, chosen)
    run.steps_at_once, run.watches = 1, True
    return run.tokens()


class _Run:
    """One call of `generate` or `stream`."""

    @outside_inference_mode
    def __init__(
        self,
        model: CausalLM,
        input_ids: Any,
        attention_mask: Tensor | None,
        cache: NemotronHybridCache | None,
        options: GenerationOptions,
    ):
        self.model = model
        embedding = model.model.embeddings.weight
        self.device, vocab_size = embedding.device, vocabulary_of(model)
        config = model.config
        if vocab_size != config.vocab_size:  # larger matrices were put in by hand
            config = config.replace(vocab_size=vocab_size)
        self.prompts = read_prompts(input_ids, attention_mask, options.tokenizer, vocab_size)
        self.options = options = options.fitted(max(map(len, self.prompts)))
        self.given = cache
        if cache is None:
            cache = NemotronHybridCache(
                model.config, len(self.prompts), embedding.dtype, self.device
            )
        self.unfed = unfed_of(cache, self.prompts, options.limit, model.config, embedding)
        self.cache: NemotronHybridCache = cache
        copies = range(options.num_return_sequences)
        self.row_prompts = [prompt for prompt in self.prompts for _ in copies]
        self.eos = eos = options.eos(config)
        self.rows = [
            Row(eos, options.limit, options.tokenizer, options.stops) for _ in self.row_prompts
        ]
        self.sampler = Sampler(options, self.row_prompts, vocab_size, embedding)
        self.active = list(range(len(self.rows)))
        self.complete: list[tuple[list[int], NemotronHybridCache]] = []
        self.can_stop = bool(eos or options.stops)
        self.steps_at_once = options.limit
        if self.can_stop:
            self.steps_at_once = 1 if self.device.type == "cpu" else STEPS_AT_ONCE
        self._step: Callable[[Tensor], Tensor] | None = None
        self.watches = False  # whether the caller's code runs between two steps
        self._way_back: WayBack | None = None  # of the caller's cache, until a token is given
        self._reading: Reading | None = None  # of the model, by a step that has copies of it

    # --- the loop -------------------------------------------------------------------------------

    def tokens(self) -> Generator[StreamedToken, None, None]:
        """Run to the end; every new token, step by step. Left early, the cache is put in order."""
        pending: Tensor | None = None  # the last token of each row, which is not fed yet
        produced = 0
        yielding: Segment | None = None  # whose tokens the caller is being given
        self._mark()
        try:
            logits = self._prefill()
            self._make_step(produced)
            while self.active:
                steps = self._steps(produced)
                base = None
                if steps > 1 and self.can_stop and not isinstance(self._step, GraphStep):
                    base = self.cache.select(self.places)
                segment = self._segment(steps, logits, pending)
                yielding = segment
                yield from self._read(segment)
                yielding = None
                pending = self._go_on(segment, base, produced)
                produced += steps
        finally:
            self._gather(yielding)

    @outside_inference_mode
    @torch.no_grad()
    def _go_on(self, segment: Segment, base: NemotronHybridCache | None, produced: int) -> Tensor:
        """Let the rows that ended in a segment leave; the unfed token `[R]` of those that go on.

        `base` and `produced` are `_set_aside`'s.
        """
        ended = [place for place in self.places if self._row(place).finish_reason]
        pending = segment.drawn[-1]
        if not ended:
            return pending
        going_on = [place for place in self.places if not self._row(place).finish_reason]
        if isinstance(self._step, GraphStep):
            if going_on and row_slots(len(going_on)) == self._step.slots:
                self._step.end(ended)
                return pending
            self._settle()
        active, cache = [self.active[place] for place in going_on], self.cache
        if going_on:
            index = torch.tensor(going_on, device=self.device)
            pending = pending.index_select(0, index)
            self.sampler.select(going_on, index)
            cache = self.cache.select(going_on)
        self._set_aside(ended, produced, base, segment)
        self.active, self.cache = active, cache
        if going_on:
            self._make_step(produced + len(segment.drawn))
            if (target := self._target) is not None:
                target.withhold(_OPEN)
        return pending

    def _steps(self, produced: int) -> int:
        """How many steps the next segment has; a graph that has no room for them is replaced."""
        steps = min(self.steps_at_once, self.options.limit - produced)
        if not isinstance(self._step, GraphStep):
            if self._reading is not None and not self._reading.holds():
                self._make_step(produced)
            return steps
        if self.options.stops:  # which the host alone can see
            steps = 1
        steps = min(steps, AHEAD)
        if not self._step.has_room(steps):
            self._settle()
            self._make_step(produced)
        return steps

    def _settle(self) -> None:
        """Bring the cache up to a graph's step, and leave the graph."""
        if isinstance(self._step, GraphStep):
            ended = {
                place: len(self.row_prompts[number]) + len(self.rows[number].tokens) - 1
                for place, number in enumerate(self.active)
                if self.rows[number].finish_reason
            }
            self._step.settle(ended)
            self._close()

    def _close(self) -> None:
        if isinstance(self._step, GraphStep):
            self._step.close()
        self._step = None

    @outside_inference_mode
    def _mark(self) -> None:
        """Keep a way back to what the caller's cache holds now."""
        if self.given is not None:
            self._way_back = WayBack(self.given)

    @outside_inference_mode
    @torch.no_grad()
    def _prefill(self) -> Tensor:
        """Feed the prompts; the logits after the last token of each row, `[R, V]`."""
        longest = max(map(len, self.unfed))
        chunk = self.options.prefill_chunk or longest
        ended, parts = list[int](), list[Tensor]()
        for start in range(0, longest, chunk):
            pieces = [tokens[start : start + chunk] for tokens in self.unfed]
            ending = [
                row for row, tokens in enumerate(self.unfed) if start < len(tokens) <= start + chunk
            ]
            if start:
                self._mark()
            parts.append(self._feed(self.cache, pieces, ending))
            ended += ending
        order = sorted(range(len(ended)), key=ended.__getitem__)
        logits = torch.cat(parts).index_select(0, torch.tensor(order, device=self.device))
        if self.options.num_return_sequences > 1:
            self.cache = self.cache.repeat(self.options.num_return_sequences)
            logits = logits.repeat_interleave(self.options.num_return_sequences, 0)
        return logits

    def _feed(
        self, cache: NemotronHybridCache, pieces: Sequence[Tensor], rows: Sequence[int] = ()
    ) -> Tensor:
        """Feed any number of tokens to each row; the logits after the last one of some rows."""
        layout = SequenceLayout.from_lengths([len(piece) for piece in pieces], self.device)
        last = [layout.offsets[row + 1] - 1 for row in rows]
        return self.model(
            torch.cat(list(pieces)).to(self.device),
            layout=layout,
            past_key_values=cache,
            logits_to_keep=torch.tensor(last, dtype=torch.int64, device=self.device),
        ).logits

    @outside_inference_mode
    def _make_step(self, produced: int) -> None:
        """What feeds one token to each row of the present cache: `[R]` -> `[R, V]`."""
        self._close()
        self._reading = None
        model, cache = self.model, self.cache
        if DecodeStep.fits(model, cache):
            self._step = DecodeStep(model, cache)
            self._reading = Reading(model) if self.watches else None
            return
        layout = SequenceLayout.plain(cache.batch_size, 1, self.device).packed
        self._step = lambda tokens: model(tokens, layout=layout, past_key_values=cache).logits
        ends = sorted(self.eos)
        steps = self.options.limit - produced
        if not self.options.graph or steps < 2:
            return
        if (reason := why_not(model, len(ends))) is not None:
            say_once(reason, self.device)
            return
        try:
            self._step = GraphStep(model, cache, ends, steps, self.sampler)
        except torch.cuda.OutOfMemoryError as error:
            _log.warning("generation: no memory for a CUDA graph, forward decodes: %s", error)
            return
        if (target := self._target) is not None:
            target.withhold(_OPEN)

    @outside_inference_mode
    @torch.no_grad()
    def _segment(self, steps: int, logits: Tensor, pending: Tensor | None) -> Segment:
        """Some steps without a look at what comes out."""
        step = self._step
        assert step is not None  # made before the first segment
        segment = Segment(pending, [], [])
        for _ in range(steps):
            if isinstance(step, GraphStep) and pending is not None:
                drawn, logprob = step.draw(pending)
            else:
                if pending is not None:
                    logits = step(pending.clamp(min=0))  # something, until the host looks
                drawn, logprob = self.sampler(logits)
            segment.drawn.append(pending := drawn)
            if logprob is not None:
                segment.logprobs.append(logprob)
        return segment

    def _read(self, segment: Segment) -> Generator[StreamedToken, None, None]:
        """Give the rows their tokens, each until it ends."""
        logprobs = torch.stack(segment.logprobs).tolist() if segment.logprobs else None
        for step, tokens in enumerate(segment.values):
            for place, number in enumerate(self.active):
                row = self.rows[number]
                if row.finish_reason is not None:
                    continue
                if tokens[place] == NO_TOKEN:
                    raise FloatingPointError(
                        f"row {number} has no new token {len(row.tokens) + 1}: the logits for it "
                        "are not finite (NaN or infinite); look for such weights, or load the "
                        "model in a dtype of a wider range"
                    )
                logprob = None if logprobs is None else logprobs[step][place]
                text = row.push(tokens[place], logprob)
                self._way_back = None
                yield StreamedToken(number, tokens[place], text, logprob, row.finish_reason)

    @property
    def places(self) -> range:
        """Places in the present batch; `active` says which rows stand there."""
        return range(len(self.active))

    def _row(self, place: int) -> Row:
        return self.rows[self.active[place]]

    # --- the cache of rows that have ended ------------------------------------------------------

    @torch.no_grad()
    def _set_aside(
        self,
        ended: Sequence[int],
        produced: int,
        base: NemotronHybridCache | None,
        segment: Segment,
    ) -> None:
        """Keep the cache of the places whose rows ended in a segment.

        Args:
            produced: tokens each row had when the segment began.
            base: the cache at that moment, where a row can end before the segment does.
        """
        counts = {place: len(self._row(place).tokens) - produced for place in ended}
        if base is None:  # no step went beyond a row's end
            counts = dict.fromkeys(ended, len(segment.drawn))
        on_time = [place for place in ended if counts[place] == len(segment.drawn)]
        early = [place for place in ended if counts[place] < len(segment.drawn)]
        if on_time:
            all_of_them = len(on_time) == len(self.active)
            self._keep(on_time, self.cache if all_of_them else self.cache.select(on_time))
        if early:
            assert base is not None, "rows that end early have been asked for"
            rewound = base.select(early)
            fed = [segment.fed(place, counts[place]) for place in early]
            if any(map(len, fed)):
                self._feed(rewound, fed)
            self._keep(early, rewound)

    def _keep(self, places: Sequence[int], cache: NemotronHybridCache) -> None:
        self.complete.append(([self.active[place] for place in places], cache))

    @property
    def _target(self) -> NemotronHybridCache | None:
        """The caller's cache, where it is to hold what comes out."""
        return self.given if self.options.num_return_sequences == 1 else None

    @outside_inference_mode
    @torch.no_grad()
    def _gather(self, yielding: Segment | None) -> None:
        """One cache of all rows, in order, in the caller's own where there is one.

        With rows still active the run was left. Before the first token, the cache then holds what
        it held before the piece of the prompts that failed, or the last; between two tokens of the
        segment `yielding`, if it has one step, what the caller knows, and otherwise it does not.
        """
        written = self._target if self._way_back is None else self.given
        try:
            if self._way_back is not None:
                self._close()
                self._way_back.go()
            else:
                self._bring_together(yielding)
        except BaseException:
            if written is not None:
                written.withhold(_NOT_GATHERED)
            raise

    def _bring_together(self, yielding: Segment | None) -> None:
        """`_gather`, once a token was given."""
        target = self._target
        if self.active:
            stopped = None if self.cache.withheld == _OPEN else self.cache.withheld
            if target is None or stopped or yielding is None or len(yielding.drawn) > 1:
                self._close()
                if target is not None:
                    target.withhold(stopped or _STOPPED)
                return  # nobody will ask for it
            self._settle()
            self._keep(self.places, self.cache)
        numbers = [number for rows, _ in self.complete for number in rows]
        self.cache = self.complete[0][1]
        if len(self.complete) > 1:
            self.cache = NemotronHybridCache.cat([cache for _, cache in self.complete])
        if numbers != sorted(numbers):
            place = {number: place for place, number in enumerate(numbers)}
            self.cache = self.cache.select([place[number] for number in sorted(numbers)])
        if target is not None and self.cache is not target:
            target.restore(self.cache.snapshot())
            self.cache = target

    # --- the result -----------------------------------------------------------------------------

    @outside_inference_mode
    def output(self) -> GenerationOutput:
        """What came out, once `tokens` is exhausted."""
        whole = [
            torch.cat([prompt, torch.tensor(row.tokens, dtype=torch.int64, device="cpu")])
            for prompt, row in zip(self.row_prompts, self.rows, strict=True)
        ]
        pad = self.options.pad(self.model.config)
        sequences = pad_sequence(whole, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in whole], device="cpu")
        mask = torch.arange(sequences.shape[1], device="cpu") < lengths[:, None]
        logprobs = None
        if self.options.return_logprobs:
            # The host's floats are fp64 and hold what the device computed exactly.
            kind = {"dtype": torch.float64, "device": "cpu"}
            rows = [torch.tensor(row.logprobs, **kind) for row in self.rows]
            logprobs = pad_sequence(rows, batch_first=True).to(self.device, self.sampler.dtype)
        with_text = self.options.tokenizer is not None
        return GenerationOutput(
            sequences=sequences.to(self.device),
            attention_mask=mask.to(self.device, torch.int64),
            prompt_lengths=tuple(len(prompt) for prompt in self.row_prompts),
            lengths=tuple(lengths.tolist()),
            finish_reason=tuple(cast(str, row.finish_reason) for row in self.rows),  # all ended
            logprobs=logprobs,
            text=tuple(row.text for row in self.rows) if with_text else None,
            cache=self.cache,
        )
