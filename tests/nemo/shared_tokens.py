"""What processes do that share tokens as NeMo AutoModel's context parallelism cuts them: layers and
models in a process's share against the same in one process."""

import copy
import os
import sys
from types import ModuleType
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"
sys.modules["triton"] = None  # as in conftest.py

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from nemo_automodel.components.distributed.context_parallel import sharder  # noqa: E402
from nemo_automodel.components.distributed.context_parallel.mamba import (  # noqa: E402
    MambaContextParallel,
)
from nemo_automodel.components.models.nemotron_v3.cache import NemotronHybridCache  # noqa: E402
from nemo_automodel.components.moe import parallelizer  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: E402
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh  # noqa: E402

from nemotron_v3.nemo import accelerate, undo  # noqa: E402
from tests.models import tokens  # noqa: E402
from tests.nemo.models import CPU, their_backend, their_config, their_model  # noqa: E402
from tests.parallel.shared_tokens import close  # noqa: E402

SIZES = {"mamba_num_heads": 8, "n_groups": 4}  # what their object divides by 2 and 4


def mesh_of_all() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("cp",))


def without_transformer_engine() -> None:
    """Their parallelizer asks whether attention is Transformer Engine's: here it is not."""
    kind = type("DotProductAttention", (nn.Module,), {})
    for name in ("transformer_engine", "transformer_engine.pytorch"):
        sys.modules[name] = ModuleType(name)
    attention = ModuleType("transformer_engine.pytorch.attention")
    attention.DotProductAttention = kind
    sys.modules[attention.__name__] = attention


def told(mixer: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What their parallelizers do to a mixer."""
    if hasattr(mixer, "setup_cp_attention"):
        mixer.setup_cp_attention(mesh)
    else:
        mixer.cp = MambaContextParallel(
            mesh.get_group(),
            mixer.num_heads,
            mixer.head_dim,
            mixer.n_groups,
            mixer.ssm_state_size,
            mixer,
        )
    return mixer


def places(mesh: DeviceMesh, lengths: list[int]) -> Tensor:
    """This process's tokens, of rows or documents one after the other."""
    found, start = [], 0
    for length in lengths:
        found.append(start + sharder.round_robin_local_indices(mesh, length))
        start += length
    return torch.cat(found)


def cases(mesh: DeviceMesh) -> dict[str, tuple[tuple[int, ...], dict, dict, Tensor]]:
    """The grid of all tokens, what a call is told in one process and in several, own places."""
    S = 32
    rows, row = places(mesh, [S, S]), places(mesh, [S])
    left, right, holes = (torch.ones(2, S, dtype=torch.int64) for _ in range(3))
    left[0, :13], right[1, 3:], holes[0, 5:9] = 0, 0, 0
    left[1, :30] = 0
    inner = {"cu_seqlens": torch.tensor([0, 3, 19, S])}
    numbers = {"seq_idx": torch.arange(S)[None] // 7}
    slots = torch.tensor([0, 16, 24, 56, 64])
    real = {"cu_seqlens": torch.tensor([0, 13, 21, 50, 58]), "cu_seqlens_padded": slots}
    pack = places(mesh, slots.diff().tolist())

    def own(mask: Tensor) -> dict:
        return {"attention_mask": mask.flatten()[rows].unflatten(0, (2, -1))}

    return {
        "rows": ((2, S), {}, {}, rows),
        "rows with offsets": ((2, S), {}, {"cu_seqlens": torch.tensor([0, S, 2 * S])}, rows),
        "left": ((2, S), {"attention_mask": left}, own(left), rows),
        "right": ((2, S), {"attention_mask": right}, own(right), rows),
        "holes": ((2, S), {"attention_mask": holes}, own(holes), rows),
        "a whole mask": ((2, S), {"attention_mask": left}, {"attention_mask": left}, rows),
        "documents in a row": ((1, S), inner, inner, row),
        "numbers of documents": ((1, S), numbers, numbers, row),
        "a pack": ((64,), {"cu_seqlens": slots}, {"cu_seqlens": slots}, pack),
        "a padded pack": ((64,), real, real, pack),
        "no batch dimension": ((64,), {}, {}, places(mesh, [64])),
    }


def layers(rank: int) -> None:
    """A mixer and attention alone: outputs and all gradients, with and without hooks inside."""
    torch.set_default_dtype(torch.float64)
    mesh = mesh_of_all()
    model = accelerate(their_model(("mamba", "attention"), **SIZES).double())
    random = torch.Generator().manual_seed(0)
    for name, (shape, alone, shared, index) in cases(mesh).items():
        x, dy = (torch.randn(*shape, 48, generator=random) for _ in range(2))
        for key in ("0", "1"):
            layer = copy.deepcopy(model.model.layers[key].mixer)
            if name == "a pack" and key == "0":
                layer.norm.register_forward_hook(lambda *_: None)
            part = copy.deepcopy(layer)
            _layer(layer, told(part, mesh), (x, dy), (alone, shared), index, f"{name} {key}")


def _layer(
    layer: nn.Module, part: nn.Module, given: tuple, said: tuple[dict, dict], index: Tensor, what
) -> None:
    x, dy = given
    whole = x.clone().requires_grad_()
    wanted = layer(whole, **said[0])
    wanted.backward(dy)

    def own(t: Tensor) -> Tensor:
        mine = t.detach().reshape(-1, 48)[index]
        return mine if x.dim() == 2 else mine.unflatten(0, (x.shape[0], -1))

    mine = own(x).requires_grad_()
    y = part(mine, **said[1])
    y.backward(own(dy))
    close(y.detach(), own(wanted), f"{what}: y")
    close(mine.grad, own(whole.grad), f"{what}: dx")
    wide = dict(layer.named_parameters())
    for n, p in part.named_parameters():
        dist.all_reduce(p.grad)
        close(p.grad, wide[n].grad, f"{what}: d{n}")


def models(rank: int) -> None:
    """A model that their parallelizer has told, on a batch that their sharder has cut, while
    PyTorch's context_parallel is entered; one whose mixers alone were told; with checkpointing."""
    torch.set_default_dtype(torch.float64)
    without_transformer_engine()
    mesh = mesh_of_all()
    blocks = ("mamba", "moe", "attention", "mlp", "mamba")
    backend = their_backend(
        rms_norm="torch"
    )  # the other one computes in fp32, whatever it is given
    plain = accelerate(their_model(blocks, backend=backend, **SIZES).double())
    ids = tokens(2, 32)
    wanted = plain(ids).logits
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    (wanted * weight).sum().backward()
    for how in ("all", "mixers", "checkpointed"):
        model = copy.deepcopy(plain)
        model.zero_grad()
        if how == "mixers":
            for block in model.model.layers.values():
                if block.block_type == "mamba":
                    told(block.mixer, mesh)
        else:
            parallelizer.apply_cp(model, mesh)
        if how == "checkpointed":
            for key, block in list(model.model.layers.items()):
                model.model.layers[key] = checkpoint_wrapper(block)
        batch = {"input_ids": ids.clone(), "labels": ids.clone(), "weight": weight.clone()}
        factory, batch, _ = sharder.shard_batch_load_balanced(mesh, None, batch)
        index = places(mesh, [32, 32])
        own = weight.reshape(64, -1)[index].unflatten(0, (2, -1))
        with factory():
            logits = model(batch["input_ids"]).logits
            (logits * own).sum().backward()
        mine = wanted.detach().reshape(64, -1)[index].unflatten(0, (2, -1))
        close(logits.detach(), mine, f"{how}: logits")
        wide = dict(plain.named_parameters())
        for n, p in model.named_parameters():
            dist.all_reduce(p.grad)
            n = n.replace("_checkpoint_wrapped_module.", "")
            close(p.grad, wide[n].grad, f"{how}: d{n}")


def refusals(rank: int) -> None:
    """What is refused, by all processes and before anything is sent."""
    torch.set_default_dtype(torch.float32)
    without_transformer_engine()
    mesh, size = mesh_of_all(), dist.get_world_size()
    model = accelerate(their_model(("mamba", "attention", "moe"), **SIZES))
    attention = model.model.layers["1"].mixer
    x, ids = torch.randn(1, 8, 48), tokens(1, 8)
    with pytest.raises(ValueError, match="cp_size=.*no parallelizer has told the layer"):
        attention(x, cp_size=size)
    batch = {"input_ids": ids.clone(), "labels": ids.clone()}
    factory, batch, _ = sharder.shard_batch_load_balanced(mesh, None, batch)
    with factory(), pytest.raises(ValueError, match=r"context_parallel is entered.*setup_cp_att"):
        attention(x)
    with pytest.raises(ValueError, match="cp_mesh is 'a mesh': give a DeviceMesh"):
        attention.setup_cp_attention("a mesh")
    parallelizer.apply_cp(model, mesh)
    _refused(model, ids, x, size, rank)
    with pytest.raises(ValueError, match="AutoModel's own attention would compute"):
        undo(model)


def _refused(model: Any, ids: Tensor, x: Tensor, size: int, rank: int) -> None:
    attention = model.model.layers["1"].mixer
    cache = NemotronHybridCache(their_config(**SIZES), 1, torch.float32, CPU)
    for call, message in (
        (lambda: model(ids, past_key_values=cache), "a cache beside tokens"),
        (lambda: attention(x, torch.ones(1, 1, 8, 8)), "a 4-D mask beside tokens"),
        (lambda: attention(x, torch.ones(1, 5)), r"shape \(1, 5\).*share a grid of"),
        (lambda: attention(x[0], torch.ones(1, 8)), "padding is by cu_seqlens_padded"),
        (lambda: attention(x[:, :7]), rf"multiple of {2 * size}"),
        (lambda: attention(x[0], cu_seqlens=torch.tensor([0, 8])), "ends at 8"),
        (lambda: attention(x, cp_size=size + 1), f"group has {size} processes"),
        (lambda: attention(x, cp_size=size, cp_rank=rank + 1), f"this is number {rank}"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    attention.attention_dropout = 0.5
    with pytest.raises(ValueError, match="attention_dropout acts on pairs"):
        attention.train()(x)
    attention.attention_dropout = 0.0
    told = {"cp_size": size, "cp_rank": rank, "cu_seqlens": torch.tensor([0, 8 * size])}
    block = model.model.layers["2"]
    assert torch.equal(block(x, **told), block(x))  # token by token: nothing to share
    assert torch.equal(attention(x, **told), attention(x))
