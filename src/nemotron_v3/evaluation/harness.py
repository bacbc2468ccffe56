"""This package's models as a model of lm-evaluation-harness.

Requests are batched, and what several of them begin with (the examples of a few-shot task, the
question before its answers) is computed once, through the cache. Texts are scored with their whole
history, however long they are.

Importing this file registers the class with the harness as `nemotron-v3`.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from nemotron_v3.chat import ChatTemplate
from nemotron_v3.chat.template import read_special_tokens, template_folder
from nemotron_v3.checkpoint import from_pretrained, merge_adapter
from nemotron_v3.data.pretrained import PretrainedTokenizer
from nemotron_v3.evaluation.forks import Fed, Forks
from nemotron_v3.evaluation.options import WINDOW
from nemotron_v3.evaluation.prefixes import LEAST_SAVED
from nemotron_v3.evaluation.streaming import Scorer
from nemotron_v3.evaluation.tally import Partial
from nemotron_v3.evaluation.texts import Tell
from nemotron_v3.generation import GenerationOptions, generate
from nemotron_v3.generation.score import LOGITS_AT_ONCE
from nemotron_v3.model.model import NemotronV3ForCausalLM
from nemotron_v3.train.processes import World

MAX_GEN_TOKS = 256
ROWS = 32
_NAMES_OF_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DRAWS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")

Request = tuple[tuple[str, str], list[int], list[int]]
"""A context and its continuation as texts, and the tokens of each."""


class NemotronV3LM(TemplateLM):
    """A model that the harness asks.

    Args:
        pretrained: a model, or the folder of a checkpoint.
        tokenizer: None is the checkpoint's.
        folder: where the chat template and the names of special tokens are; None is the
            checkpoint's.
        adapter: the folder of a LoRA adapter to merge into a checkpoint.
        dtype: of a checkpoint's weights; None is the checkpoint's.
        device: for a checkpoint; None is a GPU where there is one.
        template: for chats; None is the checkpoint's, if it has one.
        batch_size: sequences that go on at a time.
        window: tokens of a pass.
        share: whether what requests begin with in common is computed once.
        world: the processes that share the requests; None is this one alone.
        before_pass: called before every pass; what it raises ends the work.
        tell: told the kind of request, and how many of how many are answered.
        max_batch_size: the harness gives it; there is no batch size to find out, and it counts for
            nothing.

    Attributes:
        asked: tokens of the prompts and continuations, as often as they were asked for.
        computed: those of them that went through the model.

    Raises:
        ValueError: a folder that cannot be read; a model in memory without a tokenizer.
    """

    def __init__(
        self,
        pretrained: NemotronV3ForCausalLM | str | Path,
        tokenizer: PretrainedTokenizer | None = None,
        *,
        folder: str | Path | None = None,
        adapter: str | Path | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        template: ChatTemplate | None = None,
        batch_size: int | str | None = None,
        window: int = WINDOW,
        share: bool = True,
        world: World | None = None,
        before_pass: Callable[[], None] = lambda: None,
        tell: Tell | None = None,
        max_batch_size: int | str | None = None,
    ):
        super().__init__()
        if isinstance(pretrained, NemotronV3ForCausalLM):
            model = pretrained
            if adapter is not None or dtype is not None or device is not None:
                raise ValueError("adapter, dtype and device are a checkpoint's: give its folder")
        else:
            folder = pretrained if folder is None else folder
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            model = from_pretrained(pretrained, dtype, device)
            if adapter is not None:
                merge_adapter(model, adapter)
        folder = None if folder is None else Path(folder)
        if tokenizer is None:
            if folder is None:
                raise ValueError("a model in memory has no tokenizer: give one, or its folder")
            tokenizer = PretrainedTokenizer.load(folder)
        self.model, self.text, self._folder = model, tokenizer, folder
        self._adapter = None if adapter is None else Path(adapter)
        self._template = template
        self._device = model.model.embeddings.weight.device
        self._world = world if world is not None else World(0, 1, self._device)
        self._rank, self._world_size = self._world.rank, self._world.size
        rows = ROWS if batch_size in (None, "auto") else int(batch_size)
        if rows < 1:
            raise ValueError(f"batch_size is {batch_size}: give at least 1")
        least = LEAST_SAVED if share else None
        self._forks = Forks(model, window, rows, least, before_pass)
        self._scorer, self._before_pass = Scorer(model, window), before_pass
        self._tell: Tell = tell if tell is not None else lambda _kind, _done, _total: None
        self.asked = self._scored = 0
        names = {} if folder is None else read_special_tokens(folder)
        ids = {name: tokenizer.backend.token_to_id(text) for name, text in names.items()}
        config = model.config
        self._eos: int | None = ids.get("eos_token", tokenizer.eos_token_id)
        if self._eos is None:
            self._eos = config.eos_token_id if isinstance(config.eos_token_id, int) else None
        self._bos: int | None = ids.get("bos_token")

    @property
    def computed(self) -> int:
        return self._forks.computed + self._scored

    # --- tokens -----------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        if self._eos is None:
            raise ValueError("neither tokenizer nor config names an eos token, which tasks need")
        return self._eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the bos token, else the eos token."""
        return self._bos if self._bos is not None else self.eot_token_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The text's tokens; with those around it as the file says, unless it begins with the bos
        token already."""
        if add_special_tokens is None:
            prefix = self.text.backend.id_to_token(self.prefix_token_id)
            add_special_tokens = not (prefix and string.startswith(prefix))
        return self.text.backend.encode(string, add_special_tokens=add_special_tokens).ids

    @property
    def tokenizer_name(self) -> str:
        return str(self._folder or "nemotron-v3").replace("/", "__")

    # --- chats ------------------------------------------------------------------------------------

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            if self._folder is None:
                raise ValueError("a model in memory has no chat template: give one")
            where = template_folder(self._folder, self._adapter)
            self._template = ChatTemplate.load(where).with_special_tokens(self.text.special_tokens)
        return self._template

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """What tells templates apart in the harness's records; raises `ValueError` without one."""
        return self.template.fingerprint() if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as a prompt; without `add_generation_prompt` its last message goes on."""
        if add_generation_prompt:
            return self.template.render(chat_history, add_generation_prompt=True)
        return self.template.render(chat_history, continue_final_message=True)

    # --- requests ---------------------------------------------------------------------------------

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation behind its context, and whether each of its
        tokens is the likeliest one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """The same, of tokens."""
        fed = [(context + continuation)[:-1] for _, context, continuation in requests]
        self.asked += sum(map(len, fed))
        sums, greedy = [0.0] * len(requests), [True] * len(requests)
        answers = _Answers(requests, sums, greedy)
        done = 0
        for pieces, complete in self._forks.feed(fed):
            for piece in pieces:
                self._answer(piece, answers)
            done += len(complete)
            self._tell("loglikelihood", done, len(requests))
            for number in complete:
                told = (sums[number], greedy[number])
                self.cache_hook.add_partial("loglikelihood", requests[number][0], told)
        return list(zip(sums, greedy, strict=True))

    def _answer(self, piece: Fed, answers: "_Answers") -> None:
        """Take what a piece says about the tokens behind its own."""
        start = piece.stretch.start + piece.start
        asked = answers.between(piece.stretch.through(), start, start + len(piece.hidden))
        if asked:
            places = torch.tensor([place - start for place, _, _ in asked])
            targets = torch.tensor([target for _, _, target in asked])
            values, likeliest = self._log_probabilities(piece.hidden, places, targets)
            for (_, number, _), value, best in zip(asked, values, likeliest, strict=True):
                answers.sums[number] += value
                answers.greedy[number] &= best

    @torch.no_grad()
    def _log_probabilities(
        self, hidden: Tensor, places: Tensor, targets: Tensor
    ) -> tuple[list[float], list[bool]]:
        """The log-probabilities of targets at places of `[T, D]`, and whether each is likeliest."""
        once, which = places.unique(return_inverse=True)
        chunk = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        values = torch.empty(len(places), dtype=torch.float64)
        likeliest = torch.empty(len(places), dtype=torch.bool)
        for first in range(0, len(once), chunk):
            rows = once[first : first + chunk]
            logits = self.model.lm_head(hidden.index_select(0, rows.to(hidden.device)))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            mine = (which >= first) & (which < first + len(rows))
            row = (which[mine] - first).to(hidden.device)
            target = targets[mine].to(hidden.device)
            found = logits[row, target] - logits.logsumexp(-1)[row]
            values[mine] = found.to("cpu", torch.float64)
            likeliest[mine] = (logits.argmax(-1)[row] == target).cpu()
        return values.tolist(), likeliest.tolist()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text behind the bos token, or the eos token without one."""
        results = []
        for request in requests:
            (text,) = request.args
            tokens = torch.tensor([self.prefix_token_id, *self.tok_encode(text)])
            self.asked += len(tokens) - 1
            self._scored += len(tokens) - 1
            results.append(-self._score(tokens) if len(tokens) > 1 else 0.0)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, results[-1])
            self._tell("loglikelihood_rolling", len(results), len(requests))
        return results

    def _score(self, tokens: Tensor) -> float:
        part, scorer = Partial(), self._scorer
        if len(tokens) - 1 <= scorer.window:
            self._before_pass()
            part.add(scorer.pack([tokens])[0])
            return part.nats
        cache = scorer.new_cache(len(tokens))

        def read(start: int, count: int) -> Tensor:
            return tokens[start : start + count]

        while (window := scorer.step(read, len(tokens), cache)) is not None:
            self._before_pass()
            part.add(window)
        return part.nats

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to a stop string, an eos token or the most tokens."""
        results, done = [""] * len(requests), 0
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        for numbers in alike.values():
            options = self._generation_options(requests[numbers[0]].args[1])
            prompts = [self.tok_encode(requests[number].args[0]) for number in numbers]
            if not all(prompts):
                raise ValueError("a prompt is empty, which nothing can continue")
            self.asked += sum(map(len, prompts))
            # The last token of a prompt is fed by the one that continues it.
            for members, cache in self._forks.leaves([prompt[:-1] for prompt in prompts]):
                rows = [prompts[member] for member in members]
                unfed = sum(map(len, rows)) - sum(cache.lengths)
                self._scored += unfed
                out = generate(self.model, rows, past_key_values=cache, **options)
                done += len(rows)
                for row, member in enumerate(members):
                    number = numbers[member]
                    new = out.sequences[row, out.prompt_lengths[row] : out.lengths[row]]
                    text = self.text.decode(new.tolist())
                    for stop in options["stop_strings"]:
                        text = text.partition(stop)[0]
                    results[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                self._tell("generate_until", done, len(requests))
        return results

    def _generation_options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """In the names of `GenerationOptions`; raises `ValueError` for what cannot be obeyed."""
        asked = dict(asked)
        until = asked.pop("until", None) or []
        given = [asked.pop(name) for name in _NAMES_OF_MOST if asked.get(name) is not None]
        draws = {name: asked.pop(name) for name in _DRAWS if asked.get(name) is not None}
        sample = asked.pop("do_sample", None)
        sample = bool(draws.get("temperature")) if sample is None else bool(sample)
        if not sample:
            penalty = draws.get("repetition_penalty")
            draws = {} if penalty is None else {"repetition_penalty": penalty}
        unknown = {name: value for name, value in asked.items() if value is not None}
        if unknown:
            raise ValueError(
                f"generation_kwargs {unknown} are not known: take them out of the task"
            )
        ends = GenerationOptions.of({}, self.model.generation_config).eos(self.model.config)
        return {
            "do_sample": sample,
            "max_new_tokens": int(given[0]) if given else MAX_GEN_TOKS,
            "stop_strings": [until] if isinstance(until, str) else [s for s in until if s],
            "eos_token_id": sorted({*ends, self.eot_token_id}),
            "tokenizer": self.text,
        } | draws

    # --- processes --------------------------------------------------------------------------------

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The integers of every process, one behind the other."""
        parts = self._world.gather(tensor.reshape(-1).tolist())
        return torch.tensor([number for part in parts for number in part])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of every process, on the process `dst`."""
        found = self._world.collect(obj)
        return found if self._world.rank == dst else None

    def barrier(self) -> None:
        self._world.wait()


class _Answers:
    """What requests ask of the places of their sequences, and what was found."""

    def __init__(self, requests: Sequence[Request], sums: list[float], greedy: list[bool]):
        self.requests, self.sums, self.greedy = requests, sums, greedy

    def between(self, numbers: Iterable[int], start: int, end: int) -> list[tuple[int, int, int]]:
        """The places from `start` to below `end` at which a token of a continuation follows: the
        place, the request's number, and the token."""
        asked = []
        for number in numbers:
            _, context, continuation = self.requests[number]
            first = len(context) - 1
            for place in range(max(start, first), min(end, first + len(continuation))):
                asked.append((place, number, continuation[place - first]))
        return asked


# The harness lists its own classes when the first one is asked for, unless some are there already.
assert lm_eval.models.MODEL_MAPPING, "imported for its list, before ours is put beside it"
register_model("nemotron-v3")(NemotronV3LM)
