"""How tokens lie: which document each token belongs to, and where documents start.

Letters: B batch rows, S sequence length, T real tokens, D documents (written `num_documents`).

The *grid* is the shape the caller holds: `(B, S)`, or `(T,)` without a batch dimension. The
*packed* form is the real tokens alone, `[T, ...]`, document after document in grid order. Every op
works on the packed form, so padding costs nothing and cannot leak, and a padded batch, a pack and a
plain batch are one case.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PADDING = -1


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Documents on a grid of tokens; build it with one of the `from_*` constructors or `plain`.

    Tensor values are read once, by the constructor, which also checks them; nothing is read back
    from the device afterwards.

    Attributes:
        shape: the grid, `(B, S)` or `(T,)`.
        lengths: real tokens of each document, on the host; 0 is allowed (a row that is all
            padding).
        cu_seqlens: int64 `[D + 1]`, where each document starts among the packed tokens.
        token_index: int64 `[T]`, the flat grid position of each packed token; None where the grid
            has no padding, so that packing is a reshape.
    """

    shape: tuple[int, ...]
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    token_index: Tensor | None

    # --- constructors -------------------------------------------------------------------------

    @classmethod
    def plain(cls, batch: int, seq_len: int, device: torch.device | str | None = None) -> Self:
        """A batch without padding: one document of `seq_len` tokens a row."""
        return cls._build((batch, seq_len), (seq_len,) * batch, None, device)

    @classmethod
    def from_lengths(cls, lengths: list[int], device: torch.device | str | None = None) -> Self:
        """Documents of these lengths one after the other, without a batch dimension or padding."""
        lengths = tuple(int(length) for length in lengths)
        if any(length < 0 for length in lengths):
            raise ValueError(f"document lengths must not be negative, got {list(lengths)}")
        return cls._build((sum(lengths),), lengths, None, device)

    @classmethod
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        shape: tuple[int, ...] | None = None,
        cu_seqlens_padded: Tensor | None = None,
    ) -> Self:
        """Documents that start at cumulative offsets into the flattened grid.

        Args:
            cu_seqlens: integers `[D + 1]` (or `[1, D + 1]`), from 0 to the number of real tokens,
                never decreasing.
            shape: the grid, `(B, S)` or `(T,)`; by default `(cu_seqlens[-1],)`. A row border of a
                `(B, S)` grid must be a document border.
            cu_seqlens_padded: the same for documents with their padding: document i lies at the
                start of `[padded[i], padded[i + 1])`, the rest of it is padding.

        Raises:
            ValueError: offsets that do not run from 0 to the token count, that decrease, or that
                put a document across a row border.
        """
        offsets = _read_offsets("cu_seqlens", cu_seqlens)
        slots = offsets
        if cu_seqlens_padded is not None:
            slots = _read_offsets("cu_seqlens_padded", cu_seqlens_padded)
            _check_slots(offsets, slots)
        shape = (slots[-1],) if shape is None else tuple(shape)
        total = _size(shape)
        if slots[-1] != total:
            name = "cu_seqlens" if cu_seqlens_padded is None else "cu_seqlens_padded"
            raise ValueError(
                f"{name} ends at {slots[-1]} but the input holds {total} tokens {shape}: its last "
                "entry must be the token count"
            )
        _check_row_borders(shape, slots)
        lengths = tuple(end - start for start, end in pairwise(offsets))
        device = cu_seqlens.device
        if offsets == slots:
            return cls._build(shape, lengths, None, device)
        none = torch.empty(0, dtype=torch.int64)  # a pack of empty documents is all padding
        runs = [torch.arange(s, s + n) for s, n in zip(slots[:-1], lengths, strict=True)]
        return cls._build(shape, lengths, torch.cat([none, *runs]), device)

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor) -> Self:
        """Documents given by a number per token: a new one starts where the number changes.

        Args:
            seq_idx: integers, `[B, S]` or `[T]`; a negative number is padding. A document never
                crosses a row border.

        Raises:
            ValueError: not integers, or not 1-D or 2-D.
        """
        if (
            seq_idx.is_floating_point()
            or seq_idx.dtype == torch.bool
            or seq_idx.dim() not in (1, 2)
        ):
            raise ValueError(
                "seq_idx must be integers of shape (batch, seq_len) or (tokens,), got "
                f"{seq_idx.dtype} of shape {tuple(seq_idx.shape)}"
            )
        rows = (
            seq_idx.detach()
            .cpu()
            .to(torch.int64)
            .reshape(seq_idx.shape[:-1].numel(), seq_idx.shape[-1])
        )
        real = rows >= 0
        row_number = torch.arange(rows.shape[0])[:, None].expand_as(rows)[real]
        numbers = rows[real]
        starts = torch.ones_like(numbers, dtype=torch.bool)
        starts[1:] = (numbers[1:] != numbers[:-1]) | (row_number[1:] != row_number[:-1])
        first = starts.nonzero().flatten().tolist()
        # Where all is padding there is still one document, an empty one.
        lengths = tuple(b - a for a, b in pairwise([*first, numbers.numel()])) or (0,)
        index = None if bool(real.all()) else real.flatten().nonzero().flatten()
        return cls._build(tuple(seq_idx.shape), lengths, index, seq_idx.device)

    @classmethod
    def from_padding_mask(cls, mask: Tensor) -> Self:
        """One document a row, made of the tokens the mask marks as real.

        Args:
            mask: `[B, S]` of any numeric dtype, 1 = real and 0 = padding, in any pattern (left,
                right, in between). A row of zeros is an empty document.

        Raises:
            ValueError: not 2-D, or a value other than 0 and 1.
        """
        if mask.dim() != 2:
            raise ValueError(f"a padding mask has shape (batch, seq_len), got {tuple(mask.shape)}")
        values = mask.detach().cpu()
        real = values != 0
        other = values[real & (values != 1)]
        if other.numel():
            raise ValueError(
                f"a padding mask holds 1 (real) and 0 (padding), got {other[0].item()}: give "
                "document numbers as seq_idx, and additive masks in 4-D to an attention layer"
            )
        lengths = tuple(real.sum(1).tolist())
        index = None if bool(real.all()) else real.flatten().nonzero().flatten()
        return cls._build(tuple(mask.shape), lengths, index, mask.device)

    @classmethod
    def resolve(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        attention_mask: Tensor | None = None,
        *,
        layout: "SequenceLayout | None" = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_padded: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        qkv_format: str | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        cp_size: int = 1,
        cp_rank: int = 0,
    ) -> "SequenceLayout":
        """The one layout that a layer's or a model's keyword arguments describe.

        Args:
            shape: the grid of the hidden states, `(B, S)` or `(T,)`.
            device: where the hidden states are.
            attention_mask: a 2-D padding mask, or None.
            layout, cu_seqlens, seq_idx: say the same in three ways; more than one must agree.
            cu_seqlens_padded: see `from_cu_seqlens`.
            max_seqlen: an upper bound of the document lengths; checked, not needed.
            qkv_format: `"thd"` (packed) or `"bshd"`; checked, not needed.
            position_ids: accepted and without effect: the model has no positional term.
            cp_size, cp_rank: 1 and 0; a layer that was given a context-parallel group checks them
                itself.

        Raises:
            ValueError: arguments that contradict each other or the shape.
        """
        if cp_size != 1 or cp_rank != 0:
            raise ValueError(
                f"cp_size={cp_size}, cp_rank={cp_rank} but this layer was given no "
                "context-parallel group: leave them out, or shard the model first"
            )
        if cu_seqlens_padded is not None and cu_seqlens is None:
            raise ValueError("cu_seqlens_padded needs cu_seqlens beside it: give both")
        _check_qkv_format(qkv_format, shape)
        candidates: list[tuple[str, SequenceLayout]] = []
        if layout is not None:
            candidates.append(("layout", layout))
        if cu_seqlens is not None:
            built = cls.from_cu_seqlens(cu_seqlens, shape, cu_seqlens_padded)
            candidates.append(("cu_seqlens", built))
        if attention_mask is not None:
            attention_mask = _fit_mask(attention_mask, shape)
        if seq_idx is not None:
            seq_idx = _fit_grid("seq_idx", seq_idx, shape)
            if attention_mask is not None:
                cls.from_padding_mask(attention_mask.reshape(_rows(shape), shape[-1]))
                seq_idx = seq_idx.masked_fill(attention_mask.to(seq_idx.device) == 0, PADDING)
            candidates.append(("seq_idx", cls.from_seq_idx(seq_idx)))
        if not candidates:
            if attention_mask is None:
                rows = shape if len(shape) == 2 else (1, *shape)
                return cls._build(tuple(shape), (rows[1],) * rows[0], None, device)
            mask = cls.from_padding_mask(attention_mask.reshape(_rows(shape), shape[-1]))
            candidates.append(("attention_mask", mask._with_shape(shape)))
        name, chosen = candidates[0]
        if chosen.shape != tuple(shape):
            raise ValueError(
                f"{name} describes tokens of shape {chosen.shape}, the input holds {tuple(shape)}"
            )
        for other_name, other in candidates[1:]:
            if not chosen.same_as(other):
                raise ValueError(
                    f"{name} and {other_name} contradict each other: documents of lengths "
                    f"{_short(chosen.lengths)} and {_short(other.lengths)}; give one of them"
                )
        if attention_mask is not None and name in ("layout", "cu_seqlens"):
            chosen._check_mask(name, attention_mask)
        _check_max_seqlen(max_seqlen, chosen.lengths)
        return chosen.to(device)

    @classmethod
    def _build(
        cls,
        shape: tuple[int, ...],
        lengths: tuple[int, ...],
        token_index: Tensor | None,
        device: torch.device | str | None,
    ) -> Self:
        if not lengths:
            raise ValueError(
                f"tokens of shape {tuple(shape)} hold no document: give at least one row"
            )
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device=device)
        if token_index is not None:
            token_index = token_index.to(cu_seqlens.device)
        return cls(tuple(shape), lengths, cu_seqlens, token_index)

    # --- what it says -------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @cached_property
    def num_tokens(self) -> int:
        """Real tokens, T."""
        return sum(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host."""
        return (0, *accumulate(self.lengths))

    @cached_property
    def uniform_length(self) -> int | None:
        """The documents' common length, or None where they differ."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @cached_property
    def packed(self) -> "SequenceLayout":
        """The layout of the packed tokens themselves: grid `(T,)`, no padding."""
        return SequenceLayout((self.num_tokens,), self.lengths, self.cu_seqlens, None)

    @cached_property
    def seq_idx(self) -> Tensor:
        """int32 `[T]`: the document of each packed token, counted from 0."""
        lengths = self.cu_seqlens.diff()
        documents = torch.arange(self.num_documents, dtype=torch.int32, device=self.device)
        return documents.repeat_interleave(lengths, output_size=self.num_tokens)

    @cached_property
    def last_tokens(self) -> Tensor:
        """int64: the packed position of the last token of each document that has one."""
        last = [end - 1 for start, end in pairwise(self.offsets) if end > start]
        return torch.tensor(last, dtype=torch.int64, device=self.device)

    def same_as(self, other: "SequenceLayout") -> bool:
        """Whether both put the same documents at the same places (reads tensors: border use)."""
        if self.shape != other.shape:
            return False
        mine, theirs = ([n for n in x.lengths if n] for x in (self, other))
        if mine != theirs:
            return False
        if self.token_index is None or other.token_index is None:
            return self.token_index is other.token_index
        return torch.equal(self.token_index, other.token_index.to(self.device))

    # --- moving tokens ------------------------------------------------------------------------

    def pack(self, x: Tensor) -> Tensor:
        """`[*shape, ...]` -> `[T, ...]`: the real tokens, a view where there is no padding."""
        rank = len(self.shape)
        if rank == 1 and self.token_index is None and x.shape[0] == self.shape[0]:
            return x
        if tuple(x.shape[:rank]) != self.shape:
            raise ValueError(
                f"the layout describes tokens of shape {self.shape}, got a tensor of shape "
                f"{tuple(x.shape)}"
            )
        flat = x.reshape(_size(self.shape), *x.shape[rank:])
        return flat if self.token_index is None else flat.index_select(0, self.token_index)

    def unpack(self, y: Tensor) -> Tensor:
        """`[T, ...]` -> `[*shape, ...]`: every token at its place, 0 where there is padding."""
        if self.token_index is not None:
            grid = y.new_zeros(_size(self.shape), *y.shape[1:])
            y = grid.index_copy(0, self.token_index, y)
        elif len(self.shape) == 1:
            return y
        return y.reshape(*self.shape, *y.shape[1:])

    def to(self, device: torch.device | str) -> "SequenceLayout":
        """The same layout with its tensors on `device`; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        index = None if self.token_index is None else self.token_index.to(device)
        return SequenceLayout(self.shape, self.lengths, self.cu_seqlens.to(device), index)

    def derived(self, key: Hashable, build: Callable[["SequenceLayout"], Any]) -> Any:
        """`build(self)`, computed once for this layout: index tables that an op works out."""
        if key not in self._derived:
            with torch.inference_mode(False):  # the layout may serve training afterwards
                self._derived[key] = build(self)
        return self._derived[key]

    @cached_property
    def _derived(self) -> dict[Hashable, Any]:
        return {}

    def _with_shape(self, shape: tuple[int, ...]) -> "SequenceLayout":
        return SequenceLayout(tuple(shape), self.lengths, self.cu_seqlens, self.token_index)

    def _check_mask(self, name: str, mask: Tensor) -> None:
        real = torch.zeros(_size(self.shape), dtype=torch.bool)
        real[slice(None) if self.token_index is None else self.token_index.cpu()] = True
        marked = (mask.detach().cpu() != 0).flatten()
        if not torch.equal(real, marked):
            raise ValueError(
                f"{name} and attention_mask contradict each other: {int(real.sum())} real tokens "
                f"and {int(marked.sum())} marked ones; give one of them"
            )

    def __repr__(self) -> str:
        padding = _size(self.shape) - self.num_tokens
        return (
            f"SequenceLayout(shape={self.shape}, documents={self.num_documents}, "
            f"lengths={_short(self.lengths)}, padding={padding}, device={self.device})"
        )


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 2 else 1


def _size(shape: tuple[int, ...]) -> int:
    return shape[0] * shape[1] if len(shape) == 2 else shape[0]


def _short(values: tuple[int, ...], most: int = 8) -> str:
    shown = ", ".join(map(str, values[:most]))
    return f"[{shown}, ... {len(values)} in all]" if len(values) > most else f"[{shown}]"


def _read_offsets(name: str, offsets: Tensor) -> list[int]:
    if offsets.dim() == 2 and offsets.shape[0] == 1:
        offsets = offsets[0]
    if offsets.dim() != 1 or offsets.numel() < 2 or offsets.is_floating_point():
        raise ValueError(
            f"{name} must be integers of shape (documents + 1,), got {offsets.dtype} of shape "
            f"{tuple(offsets.shape)}"
        )
    values = offsets.tolist()
    if values[0] != 0 or any(b < a for a, b in pairwise(values)):
        raise ValueError(f"{name} must start at 0 and never decrease, got {_short(tuple(values))}")
    return values


def _check_slots(offsets: list[int], slots: list[int]) -> None:
    if len(offsets) != len(slots):
        raise ValueError(
            f"cu_seqlens has {len(offsets) - 1} documents, cu_seqlens_padded {len(slots) - 1}"
        )
    for document, ((a, b), (start, end)) in enumerate(
        zip(pairwise(offsets), pairwise(slots), strict=True)
    ):
        if b - a > end - start:
            raise ValueError(
                f"document {document} has {b - a} tokens (cu_seqlens) but a place of "
                f"{end - start} (cu_seqlens_padded)"
            )


def _check_row_borders(shape: tuple[int, ...], slots: list[int]) -> None:
    if len(shape) == 1:
        return
    borders = set(slots)
    for row in range(1, shape[0]):
        if row * shape[1] not in borders:
            raise ValueError(
                f"a document crosses from row {row - 1} into row {row} of the {shape} batch: "
                f"cu_seqlens must hold the row border {row * shape[1]}"
            )


def _check_qkv_format(qkv_format: str | None, shape: tuple[int, ...]) -> None:
    if qkv_format not in (None, "thd", "bshd"):
        raise ValueError(f"qkv_format must be 'thd' or 'bshd', got {qkv_format!r}")
    if qkv_format == "thd" and len(shape) == 2 and shape[0] != 1:
        raise ValueError(
            f"qkv_format='thd' means packed tokens, got a batch of shape {tuple(shape)}: give "
            "(tokens, hidden_size), or leave qkv_format out"
        )
    if qkv_format == "bshd" and len(shape) == 1:
        raise ValueError(
            f"qkv_format='bshd' means (batch, seq_len, hidden_size), got {shape[0]} tokens without "
            "a batch dimension: leave qkv_format out"
        )


def _check_max_seqlen(max_seqlen: int | Tensor | None, lengths: tuple[int, ...]) -> None:
    if max_seqlen is not None and int(max_seqlen) < max(lengths, default=0):
        raise ValueError(
            f"max_seqlen is {int(max_seqlen)} but the longest document has {max(lengths)} tokens"
        )


def _fit_grid(name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(x.shape) == tuple(shape):
        return x
    if x.numel() == _size(shape) and tuple(x.shape) == (1, *shape):
        return x[0]
    if tuple(shape) == (1, *x.shape):
        return x[None]
    raise ValueError(
        f"{name} has shape {tuple(x.shape)}, the tokens {tuple(shape)}: they must match"
    )


def _fit_mask(mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if mask.dim() > 2:
        raise ValueError(
            f"a padding mask has shape (batch, seq_len), got {tuple(mask.shape)}: only an "
            "attention layer takes a 4-D mask"
        )
    return _fit_grid("attention_mask", mask, shape)


def _flatten(layout: SequenceLayout) -> tuple[list[Any], tuple[Any, ...]]:
    return [layout.cu_seqlens, layout.token_index], (layout.shape, layout.lengths)


def _unflatten(children: Any, context: tuple[Any, ...]) -> SequenceLayout:
    cu_seqlens, token_index = children
    return SequenceLayout(*context, cu_seqlens, token_index)


pytree.register_pytree_node(
    SequenceLayout,
    _flatten,
    _unflatten,
    serialized_type_name="nemotron_v3.SequenceLayout",
)
