"""How many tokens a model knows, and another number of them.

Letters: V vocabulary, D hidden size.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from nemotron_v3.model.protocol import CausalLM


def vocabulary_of(model: CausalLM) -> int:
    """V, as the matrices have it: a model may have been given others than its config says.

    Raises:
        ValueError: the head has another number of rows than the embeddings.
    """
    rows, head = model.model.embeddings.weight.shape[0], model.lm_head
    drawn = getattr(head, "out_features", None)  # a quantised weight has a shape of its own
    if drawn is None and isinstance(getattr(head, "weight", None), Tensor):
        drawn = head.weight.shape[0]
    if drawn not in (None, rows):
        raise ValueError(
            f"the embeddings hold {rows} tokens and the head {drawn}: give both the same number, "
            "as resize_token_embeddings does"
        )
    return rows


@torch.no_grad()
def resize(
    model: CausalLM,
    new_num_tokens: int | None,
    pad_to_multiple_of: int | None,
    mean_resizing: bool,
) -> nn.Embedding:
    """`NemotronV3ForCausalLM.resize_token_embeddings`, whose errors it raises."""
    owners = _owners(model)
    old = vocabulary_of(model)
    size = _size(old if new_num_tokens is None else new_num_tokens, pad_to_multiple_of)
    config = model.config.replace(vocab_size=size)
    _check_named_tokens(config, size)
    for name, tensor in (model.mtp or {}).items():
        if old in tensor.shape[:1] and size != old:
            raise ValueError(
                f"{name} of the multi-token-prediction head has a row a token too and cannot be "
                "resized: set model.mtp = None to go on without that head"
            )
    std = None if mean_resizing else config.initializer_range
    resized = [(owner, _resized(owner.weight, size, std)) for owner in owners]
    for owner, weight in resized:
        owner.weight = nn.Parameter(weight, requires_grad=owner.weight.requires_grad)
        if isinstance(owner, nn.Embedding):
            owner.num_embeddings = size
        else:
            owner.out_features = size
    before = model.config
    for module in model.modules():
        if vars(module).get("config") is before:
            module.config = config
    return model.model.embeddings


def _owners(model: CausalLM) -> list[nn.Embedding | nn.Linear]:
    """The modules that hold the matrices: the embeddings, and a head that is not tied to them."""
    kinds: list[tuple[nn.Module, type[nn.Module]]] = [(model.model.embeddings, nn.Embedding)]
    if not model.config.tie_word_embeddings:
        kinds.append((model.lm_head, nn.Linear))
    for module, kind in kinds:
        weight = type(getattr(module, "weight", None))
        if type(module) is not kind or weight is not nn.Parameter:
            raise ValueError(
                f"a {type(module).__name__} with a weight of type {weight.__name__} "
                "cannot be resized: resize the model before it is sharded, quantised or given "
                "adapters"
            )
        if getattr(module, "bias", None) is not None:
            raise ValueError("a head with a bias cannot be resized: its bias has a row a token too")
    return [cast("nn.Embedding | nn.Linear", module) for module, _ in kinds]


def _size(tokens: Any, multiple: Any) -> int:
    for name, value in (("new_num_tokens", tokens), ("pad_to_multiple_of", multiple)):
        if name == "pad_to_multiple_of" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise ValueError(f"{name} is {value!r}: give an integer from 1 to {2**31 - 1}")
    return tokens if multiple is None else -(-tokens // multiple) * multiple


def _check_named_tokens(config: Any, size: int) -> None:
    """A smaller vocabulary may not lose the tokens that the config names."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        tokens_named = getattr(config, name, None)
        for token in tokens_named if isinstance(tokens_named, (list, tuple)) else [tokens_named]:
            if token is not None and token >= size:
                raise ValueError(
                    f"{name} of the config is {token}, which a vocabulary of {size} does not have: "
                    f"keep at least {token + 1} tokens"
                )


def _resized(weight: Tensor, size: int, std: float | None) -> Tensor:
    """`[V, D]` with `size` rows: the first ones as they are, new ones the mean of all, or drawn."""
    rows, width = weight.shape
    if size <= rows:
        return weight[:size].clone()
    if std is None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        new = weight.mean(0, dtype=wide).to(weight.dtype).expand(size - rows, width)
    else:
        new = torch.empty_like(weight[:1].expand(size - rows, width)).normal_(std=std)
    return torch.cat([weight, new])
