"""A batch that is computed in parts: what each of its tokens predicts is settled before it is cut.

Letters: T packed tokens.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nemotron_v3.layout import SequenceLayout
from nemotron_v3.model.checks import check_labels, enter, token_grid
from nemotron_v3.model.loss import IGNORE_INDEX, check_items, refuse_stray_label, targets_of
from nemotron_v3.model.model import NemotronV3ForCausalLM


@dataclass(frozen=True)
class WholeBatch:
    """Attributes:
    input_ids: `[T]` int64.
    targets: `[T]`, what each token predicts, -100 for nothing.
    items: what the sum over the targets is divided by.
    layout: of the packed tokens.
    """

    input_ids: Tensor
    targets: Tensor
    items: int | Tensor
    layout: SequenceLayout

    @classmethod
    def read(
        cls,
        model: NemotronV3ForCausalLM,
        input_ids: Tensor,
        labels: Tensor | None,
        attention_mask: Tensor | None,
        items: int | Tensor | None,
        about: dict[str, Any],
    ) -> "WholeBatch":
        """What a caller says of a batch, once all that can be refused is.

        Args:
            model: that is to compute it.
            input_ids, labels, attention_mask: as the model takes them.
            items: `num_items_in_batch`; None is the number of targets.
            about: the other arguments: `layout`, `position_ids`, and what
                `SequenceLayout.resolve` takes.

        Raises:
            ValueError, TypeError: what the model raises, and no labels.
        """
        shape, device = token_grid(input_ids, None, model.config.hidden_size)
        if labels is None:
            raise ValueError("labels are missing: a part of a batch has no logits, only a loss")
        check_labels(labels, shape, device)
        check_items(items)
        silent = [name for name in ("layout", "position_ids") if about.get(name) is None]
        about = {name: said for name, said in about.items() if name not in silent}
        weight = model.model.embeddings.weight
        context = enter(model.config, weight, shape, device, attention_mask, None, about)
        layout = context.layout
        refuse_stray_label(labels, layout)
        targets = targets_of(labels, layout)
        items = (targets != IGNORE_INDEX).sum() if items is None else items
        return cls(layout.pack(input_ids), targets, items, layout.packed)
