"""The whole model: embeddings, a loop over blocks, a head.

Letters: B batch, S sequence, T packed tokens, D hidden size, V vocabulary.
"""

from collections.abc import Collection
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron_v3 import ops
from nemotron_v3.cache import NemotronHybridCache
from nemotron_v3.config import BackendConfig, NemotronV3Config
from nemotron_v3.config.trainers import AskedByTrainers
from nemotron_v3.layers.block import NemotronV3Block
from nemotron_v3.layers.context import ForwardContext
from nemotron_v3.layers.init import init_, on_meta, place_on
from nemotron_v3.layers.linear import make_linear
from nemotron_v3.layers.moe.router import checkpoint_contexts, observed
from nemotron_v3.layers.norm import NemotronV3RMSNorm
from nemotron_v3.layout import SequenceLayout
from nemotron_v3.layout.modes import capturing
from nemotron_v3.model.checks import check_kept, check_labels, enter, refuse_ids, token_grid
from nemotron_v3.model.head import TiedHead, plain_weight
from nemotron_v3.model.loss import (
    check_items,
    per_item,
    refuse_stray_label,
    stray_label,
    targets_of,
)
from nemotron_v3.model.output import CausalLMOutput, LazyLogits, ModelOutput
from nemotron_v3.model.vocabulary import resize


class NemotronV3Model(nn.Module):
    """Embeddings, blocks and the final norm.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.
    """

    accepts_loss_kwargs: AskedByTrainers = AskedByTrainers()

    def __init__(self, config: Any, backend: BackendConfig | None = None):
        super().__init__()
        self.config: NemotronV3Config = NemotronV3Config.from_any(config)
        self.backend: BackendConfig = BackendConfig.from_any(backend)
        self.gradient_checkpointing = False
        self.recomputed: tuple[int, ...] = ()  # blocks, where gradient_checkpointing is on
        config, backend = self.config, self.backend
        self.embeddings: nn.Embedding = nn.Embedding(
            config.vocab_size, config.hidden_size, dtype=config.dtype
        )
        self.layers: nn.ModuleList = nn.ModuleList(
            NemotronV3Block(config, i, backend=backend) for i in range(config.num_hidden_layers)
        )
        self.norm_f: NemotronV3RMSNorm = NemotronV3RMSNorm(
            config.hidden_size, config.layer_norm_epsilon, config.dtype, backend
        )
        if not on_meta(self):
            init_("embeddings.weight", self.embeddings.weight, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        layout: SequenceLayout | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool = False,
        **layout_kwargs: Any,
    ) -> ModelOutput:
        """Hidden states of every token.

        The blocks see the grid as it was given, except where it holds padding: then they see the
        real tokens alone, `[T, D]`.

        Args:
            input_ids: int64 `[B, S]`, or `[T]` without a batch dimension.
            attention_mask: `[B, S]`, 1 = real and 0 = padding, or None.
            layout: where documents lie; or `cu_seqlens`, `seq_idx`, ... in `layout_kwargs`.
            past_key_values: a `NemotronHybridCache` with one row a document: the tokens follow what
                it holds, and it is updated in place. A padding mask may then also cover what came
                before.
            inputs_embeds: `[B, S, D]` or `[T, D]` in place of `input_ids`.
            output_hidden_states: keep the stream after each block.
            **layout_kwargs: what `SequenceLayout.resolve` takes.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds`, masks or layouts that do
                not fit, a cache of another config, batch or dtype.
            TypeError: an unknown keyword argument, or a cache of another kind.
        """
        context: ForwardContext | None = layout_kwargs.get("context")
        if context is None:
            context = enter(
                self.config,
                self.embeddings.weight,
                *token_grid(input_ids, inputs_embeds, self.config.hidden_size),
                attention_mask,
                past_key_values,
                layout_kwargs if layout is None else layout_kwargs | {"layout": layout},
            )
            with context.writing():
                return NemotronV3Model.forward(
                    self,
                    input_ids,
                    inputs_embeds=inputs_embeds,
                    output_hidden_states=output_hidden_states,
                    context=context,
                )
        recomputes = self.gradient_checkpointing and torch.is_grad_enabled()
        recomputed = self.recomputed if recomputes else ()
        if recomputed and context.cache is not None:
            raise ValueError(
                "a cache is updated in place and cannot be recomputed: disable gradient "
                "checkpointing, or leave the cache out"
            )
        if inputs_embeds is not None:
            hidden = inputs_embeds.to(self.embeddings.weight.dtype)
        else:
            assert input_ids is not None  # `token_grid` takes one of the two
            try:
                hidden = self.embeddings(input_ids)
            except IndexError:
                refuse_ids(self.embeddings, input_ids)
                raise
        whole, restore = context.layout, None
        if whole.token_index is not None:
            hidden, restore, context = whole.pack(hidden), whole.unpack, context.packed()
        streams = [hidden]
        for block in self.layers:
            if block.layer_idx in recomputed:
                hidden = _recomputed(block, hidden, context)
            else:
                hidden = block(hidden, context=context)
            if output_hidden_states:
                streams.append(hidden)
        hidden = self.norm_f(hidden)
        if restore is not None:
            hidden = restore(hidden)
        if context.cache is not None:
            context.cache.finish(whole)
        if not output_hidden_states:
            return ModelOutput(hidden, past_key_values=context.cache)
        streams = streams[:-1] if restore is None else map(restore, streams[:-1])
        return ModelOutput(hidden, (*streams, hidden), context.cache)

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights anew (the table of `nemotron_v3.layers.init.init_`)."""
        place_on(self, buffer_device)
        init_("embeddings.weight", self.embeddings.weight, std=self.config.initializer_range)
        for block in self.layers:
            cast(NemotronV3Block, block).init_weights()
        nn.init.ones_(self.norm_f.weight)


class NemotronV3ForCausalLM(nn.Module):
    """The model with its language-model head; `NemotronHForCausalLM` on disk.

    Args:
        config: a `NemotronV3Config`, a transformers `NemotronHConfig`, or any object with those
            attributes; never changed.
        backend: a `BackendConfig` or a foreign object with its fields; None is the default one.

    Attributes:
        mtp: tensors of the multi-token-prediction head, carried from a checkpoint to the next
            untouched; None where there are none.
        checkpoint_origin: how the checkpoint this model was read from spells things; None for a
            fresh model.
        generation_config: the content of a checkpoint's `generation_config.json`, which `generate`
            obeys where the caller is silent, and which is saved; None where there is none.
    """

    accepts_loss_kwargs: AskedByTrainers = AskedByTrainers()

    def __init__(self, config: Any, backend: BackendConfig | None = None):
        super().__init__()
        self.model: NemotronV3Model = NemotronV3Model(config, backend)
        config = self.model.config
        self.config: NemotronV3Config = config
        self.lm_head: nn.Module
        if config.tie_word_embeddings:
            self.lm_head = TiedHead(self.model)
        else:
            self.lm_head = make_linear(
                config.hidden_size,
                config.vocab_size,
                bias=False,
                backend=self.model.backend,
                dtype=config.dtype,
            )
            if not on_meta(self):
                init_(
                    "lm_head.weight",
                    self.lm_head.get_parameter("weight"),
                    std=config.initializer_range,
                )
        self.mtp: Any = None
        self.checkpoint_origin: Any = None
        self.generation_config: dict[str, Any] | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        layout: SequenceLayout | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **layout_kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of the next token, and the loss where labels are given.

        Args:
            input_ids: int64 `[B, S]`, or `[T]` without a batch dimension.
            attention_mask: `[B, S]`, 1 = real and 0 = padding, or None.
            labels: int64 of `input_ids`' shape, usually the same tensor: the shift by one happens
                here and never crosses a document's border; -100 does not count. A label at padding
                is a target only if its position directly follows a real token. Every other label
                at padding has to be -100, unless the row has no real token.
            layout: where documents lie; or `cu_seqlens`, `seq_idx`, ... in `layout_kwargs`.
            past_key_values: a `NemotronHybridCache` with one row a document: the tokens follow what
                it holds, and it is updated in place.
            inputs_embeds: `[B, S, D]` or `[T, D]` in place of `input_ids`.
            position_ids: of `input_ids`' shape, or one row for all. A new document begins where
                they restart at 0 or 1, with or without a mask. They have no other effect: the model
                has no positional encoding.
            use_cache: True makes a fresh cache where none is given; it comes back in the output.
            output_hidden_states: keep the stream after each block.
            logits_to_keep: logits of the last so many columns only (0: of all), padding included,
                or of the columns in a tensor. The loss always counts all of them. With labels and
                0, logits are computed when the output's are first read, and otherwise never.
            num_items_in_batch: divisor of the summed loss; by default the number of targets of
                this call. For gradient accumulation give the number of all micro-batches. A tensor
                is used on its device, without a wait of the host.
            **layout_kwargs: what `SequenceLayout.resolve` takes.

        Raises:
            ValueError, TypeError: see `NemotronV3Model.forward`; labels of another shape; a label
                that padding would have to predict. Where a ready `layout` is given on a GPU nothing
                is read back: the loss is then NaN.
        """
        if (handed := layout_kwargs.get("context")) is not None:
            targets = layout_kwargs["targets"]
            return self._of_targets(input_ids, handed, targets, num_items_in_batch)
        shape, device = token_grid(input_ids, inputs_embeds, self.config.hidden_size)
        if labels is not None:
            check_labels(labels, shape, device)
        if type(logits_to_keep) is not int or logits_to_keep < 0:
            check_kept(logits_to_keep, shape[-1])
        if num_items_in_batch is not None:
            check_items(num_items_in_batch)
        for name, said in (("layout", layout), ("position_ids", position_ids)):
            if said is not None:
                layout_kwargs[name] = said
        weight = self.model.embeddings.weight
        context = enter(
            self.config,
            weight,
            shape,
            device,
            attention_mask,
            past_key_values,
            layout_kwargs,
        )
        if labels is not None and _may_read(labels, layout is None):
            refuse_stray_label(labels, context.layout)
        if use_cache and past_key_values is None:
            context.cache = NemotronHybridCache(
                self.config, context.layout.num_documents, weight.dtype, device
            )
        with context.writing():
            out = self.model(
                input_ids,
                inputs_embeds=inputs_embeds,
                output_hidden_states=output_hidden_states,
                context=context,
            )
            # The head too: want of memory for the logits of a long prompt withholds the cache.
            hidden, loss = out.last_hidden_state, None
            if labels is not None:
                loss, logits = self._loss(
                    hidden, labels, context.layout, logits_to_keep, num_items_in_batch
                )
            elif type(logits_to_keep) is int and not logits_to_keep:
                logits = self.lm_head(hidden)
            else:
                logits = self.lm_head(_keep(hidden, logits_to_keep))
            return CausalLMOutput(loss, logits, out.hidden_states, out.past_key_values)

    def _of_targets(
        self,
        input_ids: Tensor | None,
        context: ForwardContext,
        targets: Tensor | None,
        items: int | Tensor | None,
    ) -> CausalLMOutput:
        """The loss of a part of a sequence, where the labels were shifted before it was cut.

        Args:
            input_ids: `[T]`. targets: `[T]`, what each token predicts, -100 for nothing; None asks
                for no loss.
            context: of the pass.
            items: see `num_items_in_batch`.
        """
        hidden = self.model(input_ids, context=context).last_hidden_state
        if targets is None:
            return CausalLMOutput(None, hidden_states=(hidden,))
        mean, _ = self._mean(hidden, targets, context.layout, 0)
        return CausalLMOutput(per_item(mean, targets, items))

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        layout: SequenceLayout,
        logits_to_keep: int | Tensor,
        items: int | Tensor | None,
    ) -> tuple[Tensor, Tensor | LazyLogits]:
        """The loss and the logits."""
        targets = targets_of(labels, layout)
        mean, logits = self._mean(hidden, targets, layout, logits_to_keep)
        loss = per_item(mean, targets, items)
        if not _may_read(labels, False) and (stray := stray_label(labels, layout)) is not None:
            loss = loss.masked_fill(stray, float("nan"))
        return loss, logits

    def _mean(
        self, hidden: Tensor, targets: Tensor, layout: SequenceLayout, logits_to_keep: int | Tensor
    ) -> tuple[Tensor, Tensor | LazyLogits]:
        """The mean loss, and the logits: those asked for by `logits_to_keep`, else unread ones."""
        packed = layout.pack(hidden)  # [T, D]
        weight = plain_weight(self.lm_head)
        if weight is None:
            logits = self.lm_head(packed)  # [T, V]
            loss = ops.cross_entropy(logits, targets)
            return loss, _keep(layout.unpack(logits), logits_to_keep)
        impl = self.model.backend.impl
        loss = ops.linear_cross_entropy(packed, weight, targets, impl=impl)
        assert isinstance(loss, Tensor)  # not the losses of each token
        if isinstance(logits_to_keep, int) and logits_to_keep == 0:
            return loss, LazyLogits(self.lm_head, hidden)
        return loss, self.lm_head(_keep(hidden, logits_to_keep))

    def generate(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Continue prompts: `nemotron_v3.generation.generate`, whose options it takes."""
        from nemotron_v3.generation import generate

        return generate(self, input_ids, attention_mask, **options)

    def stream(self, input_ids: Any, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """The same, token by token: `nemotron_v3.generation.stream`."""
        from nemotron_v3.generation import stream

        return stream(self, input_ids, attention_mask, **options)

    def score(
        self,
        input_ids: Tensor,
        layout: SequenceLayout | None = None,
        attention_mask: Tensor | None = None,
        **layout_kwargs: Any,
    ) -> Tensor:
        """Log-probabilities of given tokens: `nemotron_v3.generation.score`."""
        from nemotron_v3.generation import score

        return score(self, input_ids, layout, attention_mask, **layout_kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The module that looks tokens up."""
        return self.model.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module in its place; a tied head multiplies by its weight."""
        self.model.embeddings = cast(nn.Embedding, value)  # or what stands in its place

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Give the embeddings and the head another number of tokens, in place.

        Old tokens keep their rows, and `config.vocab_size` follows. The weights are new parameters:
        make an optimiser afterwards.

        Args:
            new_num_tokens: how many; fewer than now drops the last ones, None keeps their number.
            pad_to_multiple_of: round that up to a multiple.
            mean_resizing: a new row is the mean of the old ones; False draws it as a fresh model's.

        Returns:
            The embeddings.

        Raises:
            ValueError: a number below 1, or too small for the tokens that the config names; weights
                that are sharded, quantised or have adapters. The model is as it was.
        """
        return resize(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    def gradient_checkpointing_enable(
        self, every: int = 1, *, blocks: Collection[int] | None = None
    ) -> None:
        """Keep only the stream in front of every nth block for the backward pass, and recompute
        the block; of the others keep what their backward pass needs.

        Args:
            every: n.
            blocks: the numbers of the blocks to recompute, in place of every nth.

        Raises:
            ValueError: `every` is below 1, or a block that is not there.
        """
        if every < 1:
            raise ValueError(f"every is {every}: give 1 for all blocks, 2 for each second one, ...")
        numbers = range(self.config.num_hidden_layers)
        chosen = numbers[::every] if blocks is None else sorted(set(blocks))
        if absent := [number for number in chosen if number not in numbers]:
            raise ValueError(f"blocks {absent} are not there: the model has {len(numbers)} from 0")
        self.model.gradient_checkpointing, self.model.recomputed = True, tuple(chosen)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what each block's backward pass needs."""
        self.model.gradient_checkpointing = False

    def init_weights(self, buffer_device: torch.device | None = None) -> None:
        """Draw all weights anew (the table of `nemotron_v3.layers.init.init_`)."""
        place_on(self, buffer_device)
        self.model.init_weights()
        if not self.config.tie_word_embeddings:
            init_(
                "lm_head.weight",
                self.lm_head.get_parameter("weight"),
                std=self.config.initializer_range,
            )


def _recomputed(block: nn.Module, hidden: Tensor, context: ForwardContext) -> Tensor:
    """What a block makes of the stream, of which the backward pass computes the rest again."""
    # A compiler takes a checkpoint without contexts better: only where something watches.
    routes = block.block_type == "moe" and (not torch.compiler.is_compiling() or observed(block))
    contexts: dict[str, Any] = {"context_fn": checkpoint_contexts} if routes else {}
    return checkpoint(partial(block, context=context), hidden, use_reentrant=False, **contexts)


def _may_read(labels: Tensor, made_here: bool) -> bool:
    """Whether looking at labels costs no wait that the pass does not have already."""
    if torch.compiler.is_compiling() or type(labels) is not Tensor:
        return False
    return labels.is_cpu or (made_here and not capturing(labels.device))


def _keep(x: Tensor, positions: int | Tensor) -> Tensor:
    """The last `positions` places of the sequence (all for 0), or the places a tensor lists."""
    if isinstance(positions, Tensor):
        return x.index_select(-2, positions.to(x.device))
    return x[..., -positions:, :] if positions else x
