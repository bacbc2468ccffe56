"""What generation gives back."""

from dataclasses import dataclass

from torch import Tensor

from nemotron_v3.cache import NemotronHybridCache


@dataclass(frozen=True)
class GenerationOutput:
    """Of `generate`. Rows are the prompts in order, each `num_return_sequences` times in a row.

    Attributes:
        sequences: int64 `[R, S]` on the model's device: the prompt's real tokens, then the new
            ones, the token that ended the row included, then padding up to the longest row.
            Padding of the prompts, on whichever side it was, is gone.
        attention_mask: int64 `[R, S]`, 1 = real and 0 = padding.
        prompt_lengths: real prompt tokens of each row.
        lengths: tokens of each row in all.
        finish_reason: of each row, `"stop"` (an eos token or a stop string) or `"length"`.
        logprobs: if asked for, fp32 or wider `[R, N]`: column j for the j-th new token of each row,
            0 behind its last.
        text: with a tokenizer, what the new tokens of each row read, without the eos token or the
            stop string that ended it, or a character cut short.
        cache: holds each row's tokens but the last: `lengths[r] - 1` of row r. To go on, give
            `sequences`, `attention_mask` and this cache as `past_key_values`.
    """

    sequences: Tensor
    attention_mask: Tensor
    prompt_lengths: tuple[int, ...]
    lengths: tuple[int, ...]
    finish_reason: tuple[str, ...]
    logprobs: Tensor | None
    text: tuple[str, ...] | None
    cache: NemotronHybridCache

    @property
    def new_tokens(self) -> list[list[int]]:
        """The new tokens of each row."""
        rows = zip(self.sequences.tolist(), self.prompt_lengths, self.lengths, strict=True)
        return [row[start:end] for row, start, end in rows]


@dataclass(frozen=True)
class StreamedToken:
    """One new token.

    Attributes:
        row: which row it belongs to.
        token_id: the token.
        text: what is complete now, never half a character; "" without a tokenizer. A row's texts
            put together are `GenerationOutput.text`.
        logprob: the model's log-probability of it, if asked for.
        finish_reason: `"stop"` or `"length"` with a row's last token, else None.
    """

    row: int
    token_id: int
    text: str
    logprob: float | None
    finish_reason: str | None
