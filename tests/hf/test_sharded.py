"""DDP and FSDP2 around an accelerated model, in two processes, against one."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nemotron_v3.hf import accelerate, is_accelerated, undo
from tests.hf.models import close, gradients, tokens, transformers_model
from tests.model.test_distributed import PROCESSES, run

pytestmark = pytest.mark.integration


def batch(rank: int) -> dict[str, torch.Tensor]:
    """Packed: the two processes get documents of other lengths."""
    ids = tokens(1, 24, seed=rank)
    lengths = ((10, 14), (3, 21))[rank]
    return {
        "input_ids": ids,
        "labels": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }


def mean_of_the_halves() -> dict[str, torch.Tensor]:
    model = accelerate(transformers_model().train())
    for rank in range(PROCESSES):
        (model(**batch(rank)).loss / PROCESSES).backward()
    return gradients(model)


def check(model: nn.Module) -> None:
    expected = mean_of_the_halves()
    found = {
        name.replace("grad module.", "grad "): g.full_tensor() if isinstance(g, DTensor) else g
        for name, g in gradients(model).items()
    }
    assert found.keys() == expected.keys()
    wrong = [name for name in found if not close(found[name], expected[name], 1e-5)]
    assert not wrong, wrong


def ddp(rank: int) -> None:
    model = DistributedDataParallel(accelerate(transformers_model().train()))
    assert is_accelerated(model)
    model(**batch(rank)).loss.backward()
    check(model)


def fsdp2(rank: int) -> None:
    model = accelerate(transformers_model().train())
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    model(**batch(rank)).loss.backward()
    check(model)
    with pytest.raises(ValueError, match="FSDPNemotronHForCausalLM .* undo before sharding"):
        undo(model)
    sharded_first = transformers_model()
    fully_shard(sharded_first.model.layers[0])
    with pytest.raises(TypeError, match="accelerate the model before it is sharded"):
        accelerate(sharded_first)


@pytest.mark.parametrize("worker", [ddp, fsdp2], ids=["ddp", "fsdp2"])
def test_gradients_are_the_mean_over_processes(worker):
    run(worker)
