"""How tokens lie: which document each token belongs to, and where documents start.

Letters: B batch rows, S sequence length, T real tokens. Documents have none: `n_docs`.

The *grid* is the shape the caller holds: `(B, S)`, or `(T,)` without a batch dimension. The
*packed* form is the real tokens alone, `[T, ...]`, document after document in grid order. Every op
works on the packed form, so padding costs it nothing and cannot leak, and a padded batch, a pack
and a plain batch are one case.
"""

from collections.abc import Callable, Hashable, Iterable
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from nemotron_v3.layout import handles
from nemotron_v3.layout.checks import (
    agreed,
    all_equal,
    check_mask_agrees,
    check_max_seqlen,
    check_qkv_format,
    check_row_borders,
    check_slots,
    check_tensor,
    fit_grid,
    fit_mask,
    grid_rows,
    grid_size,
    lengths_among,
    no_documents_error,
    read_offsets,
    shortened,
)
from nemotron_v3.layout.modes import capturing, on_device, once, outside_inference_mode
from nemotron_v3.layout.positions import count_on, fit_positions, runs_of

PADDING = -1


class SequenceLayout:
    """Documents on a grid of tokens; build it with one of the `from_*` constructors or `plain`.

    Tensor values are read once, by the constructor, which also checks them; nothing is read back
    from the device afterwards. A layout does not change. It is no dataclass, so that what takes
    dataclasses among a module's arguments apart, to cast or move the tensors in them (FSDP), leaves
    it alone: all blocks of a pass see one object, and the index tables that it keeps.

    Attributes:
        shape: the grid, `(B, S)` or `(T,)`.
        lengths: real tokens of each document, on the host; 0 is allowed (a row that is all
            padding).
        cu_seqlens: int64 `[n_docs + 1]`, where each document starts among the packed tokens.
        token_index: int64 `[T]`, the flat grid position of each packed token; None where the grid
            has no padding, so that packing is a reshape.
        handle: the number by which a compiled graph finds it (`layout/handles.py`).
    """

    shape: tuple[int, ...]
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    token_index: Tensor | None
    device: torch.device
    handle: int
    _tables: dict[Hashable, Any]

    def __init__(
        self,
        shape: tuple[int, ...],
        lengths: tuple[int, ...],
        cu_seqlens: Tensor,
        token_index: Tensor | None,
    ):
        put = object.__setattr__
        put(self, "shape", shape)
        put(self, "lengths", lengths)
        put(self, "cu_seqlens", cu_seqlens)
        put(self, "token_index", token_index)
        # A pytree's structure is a layout of no tensors, which are nowhere.
        put(self, "device", getattr(cu_seqlens, "device", None))
        put(self, "_tables", {})
        put(self, "handle", handles.UNKNOWN if torch.compiler.is_compiling() else handles.new(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy is another layout, and has a number of its own."""
        self.__dict__.update(state | {"handle": handles.new(self)})

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a SequenceLayout does not change: build another for a new {name}")

    # --- constructors -------------------------------------------------------------------------

    @classmethod
    def plain(cls, batch: int, seq_len: int, device: torch.device | str | None = None) -> Self:
        """A batch without padding: one document of `seq_len` tokens a row."""
        return cls.of_rows((batch, seq_len), device)

    @classmethod
    @outside_inference_mode
    def of_rows(cls, shape: tuple[int, ...], device: torch.device | str | None = None) -> Self:
        """One document a row of a grid `(B, S)`, or one of all tokens of a grid `(T,)`."""
        rows, length = shape if len(shape) == 2 else (1, *shape)
        if not rows:
            raise no_documents_error(shape)
        offsets = torch.arange(rows + 1, device=device) * length
        return cls(tuple(shape), (length,) * rows, offsets, None)

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str | None = None) -> Self:
        """Documents of these lengths one after the other, without a batch dimension or padding."""
        counts = tuple(int(length) for length in lengths)
        if any(count < 0 for count in counts):
            raise ValueError(f"document lengths must not be negative, got {list(counts)}")
        return cls._build((sum(counts),), counts, None, device)

    @classmethod
    @outside_inference_mode
    def from_cu_seqlens(
        cls,
        cu_seqlens: Tensor,
        shape: tuple[int, ...] | None = None,
        cu_seqlens_padded: Tensor | None = None,
    ) -> Self:
        """Documents that start at cumulative offsets into the flattened grid.

        Args:
            cu_seqlens: integers `[n_docs + 1]` (or `[1, n_docs + 1]`), from 0 to the number of real
                tokens, never decreasing.
            shape: the grid, `(B, S)` or `(T,)`; by default `(cu_seqlens[-1],)`. A row border of a
                `(B, S)` grid must be a document border.
            cu_seqlens_padded: the same for documents with their padding: document i lies at the
                start of `[padded[i], padded[i + 1])`, the rest of it is padding.

        Raises:
            ValueError: offsets that do not run from 0 to the token count, that decrease, or that
                put a document across a row border.
        """
        offsets = read_offsets("cu_seqlens", cu_seqlens)
        slots = offsets
        if cu_seqlens_padded is not None:
            slots = read_offsets("cu_seqlens_padded", cu_seqlens_padded)
            check_slots(offsets, slots)
        shape = (slots[-1],) if shape is None else tuple(shape)
        total = grid_size(shape)
        if slots[-1] != total:
            name = "cu_seqlens" if cu_seqlens_padded is None else "cu_seqlens_padded"
            raise ValueError(
                f"{name} ends at {slots[-1]} but the input holds {total} tokens {shape}: its last "
                "entry must be the token count"
            )
        check_row_borders(shape, slots)
        lengths = tuple(end - start for start, end in pairwise(offsets))
        device = cu_seqlens.device
        if offsets == slots:
            return cls._build(shape, lengths, None, device)
        # On the host, whatever the default device is; a pack of empty documents is all padding.
        none = torch.empty(0, dtype=torch.int64, device="cpu")
        places = zip(slots[:-1], lengths, strict=True)
        runs = [torch.arange(s, s + n, device="cpu") for s, n in places]
        return cls._build(shape, lengths, torch.cat([none, *runs]), device)

    @classmethod
    @outside_inference_mode
    def from_seq_idx(cls, seq_idx: Tensor) -> Self:
        """Documents given by a number per token: a new one starts where the number changes.

        Args:
            seq_idx: integers, `[B, S]` or `[T]`; a negative number is padding. A document never
                crosses a row border.

        Raises:
            ValueError: not integers, or not 1-D or 2-D.
        """
        check_tensor("seq_idx", seq_idx)
        shape = tuple(seq_idx.shape)
        fractions = seq_idx.is_floating_point() or seq_idx.dtype == torch.bool
        if fractions or len(shape) not in (1, 2):
            raise ValueError(
                "seq_idx must be integers of shape (batch, seq_len) or (tokens,), got "
                f"{seq_idx.dtype} of shape {shape}"
            )
        rows = seq_idx.detach().cpu().long().reshape(grid_rows(shape), shape[-1])
        real = rows >= 0
        index = None if bool(real.all()) else real.flatten().nonzero().flatten()
        return cls._build(shape, runs_of(rows, real), index, seq_idx.device)

    @classmethod
    @outside_inference_mode
    def from_padding_mask(cls, mask: Tensor) -> Self:
        """One document a row, made of the tokens the mask marks as real.

        Args:
            mask: `[B, S]` of any numeric dtype, 1 = real and 0 = padding, in any pattern (left,
                right, in between). A row of zeros is an empty document.

        Raises:
            ValueError: not 2-D, or a value other than 0 and 1.
        """
        check_tensor("a padding mask", mask)
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
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        max_seqlen: int | Tensor | None = None,
        max_seqlen_q: int | Tensor | None = None,
        max_seqlen_kv: int | Tensor | None = None,
        qkv_format: str | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        cp_size: int | None = None,
        cp_rank: int | None = None,
    ) -> "SequenceLayout":
        """The one layout that a layer's or a model's keyword arguments describe.

        Args:
            shape: the grid of the hidden states, `(B, S)` or `(T,)`.
            device: where the hidden states are.
            attention_mask: a 2-D padding mask, or None.
            layout, cu_seqlens, seq_idx: say the same in three ways; more than one must agree.
                Beside a mask, offsets that end at its number of real tokens count those alone, in
                grid order.
            cu_seqlens_padded: see `from_cu_seqlens`.
            cu_seqlens_q, cu_seqlens_kv: other names of cu_seqlens: each token is a query and a key.
            max_seqlen: an upper bound of the document lengths; checked, not needed.
            max_seqlen_q, max_seqlen_kv: other names of it.
            qkv_format: `"thd"` (packed) or `"bshd"`; checked, not needed.
            position_ids: of the grid's shape, or one row for all. Only restarts matter: within a
                document of the other arguments (by default a row) a restart at 0 or 1 begins a new
                document. Position ids with any other break are ignored.
            cp_size, cp_rank: 1 and 0, or None. A layer with a context-parallel group takes larger
                ones, and reads them before.

        Raises:
            ValueError: arguments that contradict each other or the shape.
        """
        cu_seqlens = agreed("cu_seqlens", cu_seqlens, cu_seqlens_q, cu_seqlens_kv)
        max_seqlen = agreed("max_seqlen", max_seqlen, max_seqlen_q, max_seqlen_kv)
        if cp_size not in (None, 1) or cp_rank not in (None, 0):
            raise ValueError(
                f"cp_size={cp_size}, cp_rank={cp_rank} but this layer was given no "
                "context-parallel group: leave them out, or shard the model first"
            )
        if cu_seqlens_padded is not None and cu_seqlens is None:
            raise ValueError("cu_seqlens_padded needs cu_seqlens beside it: give both")
        check_qkv_format(qkv_format, shape)
        candidates: list[tuple[str, SequenceLayout]] = []
        if layout is not None:
            if not isinstance(layout, SequenceLayout):
                raise TypeError(f"layout is a {type(layout).__name__}: give a SequenceLayout")
            candidates.append(("layout", layout))
        if attention_mask is not None:
            attention_mask = fit_mask(attention_mask, shape)
        if cu_seqlens is not None:
            built = None
            if attention_mask is not None and cu_seqlens_padded is None:
                built = cls._of_real_tokens(cu_seqlens, attention_mask, shape)
            if built is None:
                built = cls.from_cu_seqlens(cu_seqlens, shape, cu_seqlens_padded)
            candidates.append(("cu_seqlens", built))
        if seq_idx is not None:
            seq_idx = fit_grid("seq_idx", seq_idx, shape)
            if attention_mask is not None:
                cls.from_padding_mask(attention_mask.reshape(grid_rows(shape), shape[-1]))
                seq_idx = seq_idx.masked_fill(attention_mask.to(seq_idx.device) == 0, PADDING)
            candidates.append(("seq_idx", cls.from_seq_idx(seq_idx)))
        if not candidates:
            rows = cls._of_rows(shape, device, attention_mask).split_by(position_ids)
            if attention_mask is not None:
                check_max_seqlen(max_seqlen, rows.lengths)
            return rows.to(device)
        name, chosen = candidates[0]
        if chosen.shape != tuple(shape):
            raise ValueError(
                f"{name} describes tokens of shape {chosen.shape}, the input holds {tuple(shape)}"
            )
        for other_name, other in candidates[1:]:
            if not chosen.same_as(other):
                raise ValueError(
                    f"{name} and {other_name} contradict each other: documents of lengths "
                    f"{shortened(chosen.lengths)} and {shortened(other.lengths)}; give one of them"
                )
        if attention_mask is not None and name in ("layout", "cu_seqlens"):
            check_mask_agrees(name, chosen, attention_mask)
        check_max_seqlen(max_seqlen, chosen.lengths)
        if (counted := chosen.split_by(position_ids)) is not chosen:
            raise ValueError(
                f"{name} and position_ids contradict each other: documents of lengths "
                f"{shortened(chosen.lengths)} and {shortened(counted.lengths)}; give one of them"
            )
        return chosen.to(device)

    @classmethod
    def _of_rows(
        cls, shape: tuple[int, ...], device: torch.device, attention_mask: Tensor | None
    ) -> "SequenceLayout":
        """One document a row, of all its tokens or of those that a mask marks."""
        if attention_mask is None:
            return cls.of_rows(shape, device)
        mask = cls.from_padding_mask(attention_mask.reshape(grid_rows(shape), shape[-1]))
        return mask._with_shape(shape)

    @classmethod
    @outside_inference_mode
    def _build(
        cls,
        shape: tuple[int, ...],
        lengths: tuple[int, ...],
        token_index: Tensor | None,
        device: torch.device | str | None,
    ) -> Self:
        if not lengths:
            raise no_documents_error(shape)
        if all_equal(lengths):  # made where it is needed: no copy, which a graph cannot capture
            cu_seqlens = torch.arange(len(lengths) + 1, device=device) * lengths[0]
        else:
            cu_seqlens = on_device([0, *accumulate(lengths)], device)
        if token_index is not None:
            token_index = on_device(token_index, cu_seqlens.device)
        return cls(tuple(shape), lengths, cu_seqlens, token_index)

    @classmethod
    def _of_real_tokens(
        cls, cu_seqlens: Tensor, mask: Tensor, shape: tuple[int, ...]
    ) -> "SequenceLayout | None":
        """Offsets into the tokens that a mask marks as real; None where they are none of those."""
        offsets = read_offsets("cu_seqlens", cu_seqlens)
        if offsets[-1] == grid_size(shape):
            return None
        real = cls.from_padding_mask(mask.reshape(grid_rows(shape), shape[-1]))
        lengths = lengths_among(offsets, real.offsets, shape)
        return cls._build(shape, lengths, real.token_index, cu_seqlens.device)

    # --- what it says -------------------------------------------------------------------------

    @property
    def num_documents(self) -> int:
        return len(self.lengths)

    @once
    def num_tokens(self) -> int:
        """Real tokens, T."""
        if self.token_index is not None:
            return self.token_index.shape[0]
        return grid_size(self.shape)

    @once
    def offsets(self) -> tuple[int, ...]:
        """`cu_seqlens` on the host."""
        return (0, *accumulate(self.lengths))

    @once
    def uniform_length(self) -> int | None:
        """The documents' common length, or None where they differ."""
        return self.lengths[0] if all_equal(self.lengths) else None

    @once
    def packed(self) -> "SequenceLayout":
        """The layout of the packed tokens themselves: grid `(T,)`, no padding."""
        packed = SequenceLayout((self.num_tokens,), self.lengths, self.cu_seqlens, None)
        if torch.compiler.is_compiling():
            object.__setattr__(packed, "handle", handles.of_packed(self.handle))
        return packed

    @once
    def seq_idx(self) -> Tensor:
        """int32 `[T]`: the document of each packed token, counted from 0."""
        lengths = self.cu_seqlens.diff()
        documents = torch.arange(self.num_documents, dtype=torch.int32, device=self.device)
        return documents.repeat_interleave(lengths, output_size=self.num_tokens)

    @once
    def last_tokens(self) -> Tensor:
        """int64: the packed position of the last token of each document that has one."""
        last = [end - 1 for start, end in pairwise(self.offsets) if end > start]
        return on_device(last, self.device)

    def same_as(self, other: "SequenceLayout") -> bool:
        """Whether both put the same documents at the same places. Waits for the device."""
        if self.shape != other.shape:
            return False
        mine, theirs = ([n for n in x.lengths if n] for x in (self, other))
        if mine != theirs:
            return False
        if self.token_index is None or other.token_index is None:
            return self.token_index is other.token_index
        return torch.equal(self.token_index, other.token_index.to(self.device))

    @outside_inference_mode
    def split_by(self, position_ids: Tensor | None, *, every_break: bool = False) -> Self:
        """The layout whose documents also start where positions do. Waits for the device.

        Args:
            position_ids: on the grid, or one row for all; None says nothing, and neither do those
                of rows of one token.
            every_break: start a document wherever positions do not go on; else only where all
                breaks are restarts at 0 or 1 (`positions.count_on`).

        Returns:
            Itself where positions start nothing.

        Raises:
            TypeError, ValueError: no tensor, or one of another shape.
        """
        if position_ids is None or self.shape[-1] < 2:
            return self
        positions = fit_positions(position_ids, self.shape)
        if positions.is_meta:  # a meta tensor has no values
            return self
        positions, index = positions.detach().cpu().flatten(), None
        places = torch.arange(len(positions), device="cpu")
        if self.token_index is not None:
            places = index = self.token_index.cpu()
            positions = positions[places]
        lengths = count_on(positions, places, self.lengths, restarts_alone=not every_break)
        if lengths == self.lengths:
            return self
        return self._build(self.shape, lengths, index, self.device)

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
        flat = x.flatten(0, rank - 1)
        return flat if self.token_index is None else flat.index_select(0, self.token_index)

    def unpack(self, y: Tensor) -> Tensor:
        """`[T, ...]` -> `[*shape, ...]`: every token at its place, 0 where there is padding."""
        if self.token_index is not None:
            grid = y.new_zeros(grid_size(self.shape), *y.shape[1:])
            y = grid.index_copy(0, self.token_index, y)
        elif len(self.shape) == 1:
            return y
        return y.reshape(*self.shape, *y.shape[1:])

    @outside_inference_mode
    def to(self, device: torch.device | str) -> "SequenceLayout":
        """The same layout with its tensors on `device`; itself where they are there already."""
        if self.device == torch.device(device):
            return self
        index = None if self.token_index is None else self.token_index.to(device)
        return SequenceLayout(self.shape, self.lengths, self.cu_seqlens.to(device), index)

    def derived(self, key: Hashable, build: Callable[["SequenceLayout"], Any]) -> Any:
        """`build(self)`, computed once for this layout: index tables that an op works out.

        Tables that are built while a graph is captured hold nothing before its first replay: they
        serve that capture alone.
        """
        if torch.compiler.is_compiling():  # which finds equal parts of a graph by itself
            return build(self)
        if key in self._tables:
            return self._tables[key]
        if torch.is_inference_mode_enabled():  # the layout may serve training afterwards
            build = outside_inference_mode(build)
        tables = build(self)
        if not capturing(self.device):
            self._tables[key] = tables
        return tables

    def _with_shape(self, shape: tuple[int, ...]) -> "SequenceLayout":
        return SequenceLayout(tuple(shape), self.lengths, self.cu_seqlens, self.token_index)

    def __repr__(self) -> str:
        padding = grid_size(self.shape) - self.num_tokens
        return (
            f"SequenceLayout(shape={self.shape}, documents={self.num_documents}, "
            f"lengths={shortened(self.lengths)}, padding={padding}, device={self.device})"
        )
