"""Tiny models of transformers, accelerated and plain, and what they compute."""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from nemotron_v3.hf import accelerate
from tests.accuracy import relative_error
from tests.model.test_against_transformers import LATENT, kind, ours_of, transformers_model
from tests.models import tokens

__all__ = [
    "LATENT",
    "accelerated",
    "by_the_rule",
    "close",
    "documents",
    "gradients",
    "ours_of",
    "right_padded",
    "tokens",
    "transformers_model",
]

Results = dict[str, Tensor]


def accelerated(plain: nn.Module, **options) -> nn.Module:
    """A copy of a plain model, accelerated."""
    return accelerate(copy.deepcopy(plain), **options)


def documents(lengths: Iterable[int], seed: int = 0) -> list[Tensor]:
    """Tokens `[1, length]` of each."""
    return [tokens(1, length, seed=100 * seed + n) for n, length in enumerate(lengths)]


def gradients(model: nn.Module) -> Results:
    return {f"grad {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def right_padded(docs: list[Tensor], left: bool = False) -> dict[str, Tensor]:
    """One document a row: `input_ids`, `attention_mask`, and `labels` that skip the padding."""
    S = max(doc.shape[1] for doc in docs)
    ids, mask = (torch.zeros(len(docs), S, dtype=torch.int64) for _ in range(2))
    for row, doc in enumerate(docs):
        n = doc.shape[1]
        at = slice(S - n, S) if left else slice(0, n)
        ids[row, at], mask[row, at] = doc[0], 1
    labels = ids.masked_fill(mask == 0, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def close(measured: Tensor, true: Tensor, allowed: float = 2e-5) -> bool:
    """Whether no element is further off than so much of the largest."""
    return bool((measured - true).abs().max() <= allowed * true.abs().max())


def by_the_rule(draws: Iterable[Mapping[str, Results]], dtype: torch.dtype) -> None:
    """Raises AssertionError unless ours errs at most twice as much as theirs, plus a roundoff.

    Args:
        draws: of each draw, the results of `ours`, `theirs` and `truth`, the fp64 reference.
            Tensors of one name but for numbers are measured together.
    """
    pooled = defaultdict(lambda: defaultdict(list))
    for drawn in draws:
        assert drawn["ours"].keys() == drawn["truth"].keys() == drawn["theirs"].keys()
        for who, results in drawn.items():
            for name, tensor in results.items():
                pooled[kind(name)][who].append(tensor.detach().flatten())
    failures = []
    for name, values in pooled.items():
        ours, theirs, true = (torch.cat(values[who]) for who in ("ours", "theirs", "truth"))
        error = relative_error(ours, true)
        allowed = 2 * relative_error(theirs, true) + torch.finfo(dtype).eps / 2
        if not error <= allowed:
            failures.append(f"{name} {tuple(true.shape)}: {error:.2e} > {allowed:.2e}")
    assert not failures, "\n".join(failures)
