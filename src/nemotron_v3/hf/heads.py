"""Heads that transformers has for other models and not for this one: of whole sequences, such as
reward models, and of tokens."""

from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.nemotron_h import modeling_nemotron_h as theirs

from nemotron_v3.hf.model import AcceleratedModelMixin


class _Head(AcceleratedModelMixin):
    # transformers inspects the source file to decide whether the attention implementation can be
    # set, and the experts'; delegate to the backbone.

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return theirs.NemotronHModel._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return theirs.NemotronHModel._can_set_experts_implementation()


class NemotronHForSequenceClassification(
    _Head, GenericForSequenceClassification, theirs.NemotronHPreTrainedModel
):
    """An accelerated backbone with transformers' generic head of sequences (`score`), which reads
    the last token that is not `config.pad_token_id`.

    A checkpoint of a language model gives the backbone; `score` is drawn then.

    Args:
        config: a transformers `NemotronHConfig`, with `num_labels`.

    Raises:
        ImportError, ValueError: as `NemotronHForCausalLM`.
    """


class NemotronHForTokenClassification(
    _Head, GenericForTokenClassification, theirs.NemotronHPreTrainedModel
):
    """An accelerated backbone with transformers' generic head of tokens (`dropout`, `score`).

    Args and Raises: as `NemotronHForSequenceClassification`.
    """
