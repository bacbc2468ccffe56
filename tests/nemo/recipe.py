"""AutoModel's own fine-tuning recipe, on a CPU.

    python -m tests.nemo.recipe FOLDER:STEPS:DTYPE ...

It asks for CUDA by name in several places. The questions are answered here with the CPU, and
nothing else of it is touched. FOLDER holds `base`, the checkpoint to start from, and what the
recipe writes; a run goes on from the newest checkpoint there. To `seen.pt` goes what each step saw:
the loss, the norm and all gradients as the optimizer got them.
"""

import os
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "NEMO_ENABLE_USER_MODULES": "1", "HF_HUB_OFFLINE": "1"}
sys.modules["triton"] = None  # as in conftest.py
for name in ("mlflow", "wandb"):  # versions 0.5 and 0.6 import them whether they are used or not
    if find_spec(name) is None:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

BATCH, ROWS, LENGTH, SEED = 4, 2, 24, 5
DATA = {"num_sentences": 64, "mean_len": 14.0, "vocab_size": 90, "max_sentence_len": LENGTH}
LEARNING_RATE, DECAY, MAX_NORM = 1e-3, 0.01, 1.0


def config(folder: Path, steps: int, dtype: str, size: int) -> dict[str, Any]:
    """A recipe file as a dict: the `backend` is made by the line of docs/nemo.md."""
    return {
        "seed": SEED,
        "dist_env": {"backend": "gloo", "timeout_minutes": 2},
        "step_scheduler": {
            "global_batch_size": BATCH,
            "local_batch_size": ROWS,
            "ckpt_every_steps": 2,
            "max_steps": steps,
            "num_epochs": 9,
        },
        "model": {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(folder / "base"),
            "torch_dtype": dtype,
            "backend": {
                "_target_": "nemotron_v3.nemo.backend",
                "attn": "sdpa",
                "linear": "torch",
                "rms_norm": "torch_fp32",
                "experts": "torch",
                "dispatcher": "torch",
                "rope_fusion": False,
            },
        },
        "checkpoint": {
            "enabled": True,
            "checkpoint_dir": str(folder / "checkpoints"),
            "model_save_format": "safetensors",
            "save_consolidated": True,
        },
        "distributed": {
            "strategy": "fsdp2",
            "dp_size": size,
            "tp_size": 1,
            "cp_size": 1,
            # By itself it would compute in bf16, whatever the weights are.
            "mp_policy": {
                "_target_": "torch.distributed.fsdp.MixedPrecisionPolicy",
                "param_dtype": dtype,
                "reduce_dtype": "float32",
                "cast_forward_inputs": False,
            },
        },
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "dataset": {
            "_target_": "nemo_automodel.components.datasets.llm.mock.build_unpacked_dataset",
            "tokenizer": None,
            **DATA,
        },
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": False,
        },
        "clip_grad_norm": {"max_norm": MAX_NORM},
        "optimizer": {"_target_": "torch.optim.AdamW", "lr": LEARNING_RATE, "weight_decay": DECAY},
    }


class _Device(type):
    """`torch.device`, which takes "cuda" for the CPU."""

    def __call__(cls, kind: Any = "cpu", *_: Any) -> torch.device:
        asked = str(kind).partition(":")[0]
        return torch.device("cpu" if asked == "cuda" else kind)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.device)


class _Cuda:
    """The questions of the recipe about CUDA, answered for a CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    current_device = staticmethod(lambda: torch.device("cpu"))
    max_memory_allocated = staticmethod(lambda *_: 0)
    reset_peak_memory_stats = empty_cache = synchronize = staticmethod(lambda *_: None)


class _Torch(ModuleType):
    """`torch` as AutoModel's modules are to see it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    device = _Device("device", (), {})
    cuda = _Cuda()


def without_cuda() -> None:
    """Let the modules of AutoModel that ask for CUDA before there is a layer find a CPU."""
    import nemo_automodel._transformers.auto_model
    import nemo_automodel.components.models.nemotron_v3.model
    import nemo_automodel.recipes.llm.train_ft  # noqa: F401

    stand_in = _Torch("torch")
    for name, module in list(sys.modules.items()):
        if name.startswith("nemo_automodel.") and vars(module).get("torch") is torch:
            module.torch = stand_in
    barrier = dist.barrier
    dist.barrier = lambda group=None, async_op=False, device_ids=None: barrier(group, async_op)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole, whoever holds their parts."""
    full = lambda t: t.full_tensor() if hasattr(t, "full_tensor") else t  # noqa: E731
    return {
        name: full(p.grad).detach().clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def run(folder: Path, steps: int, dtype: str, size: int) -> None:
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction

    options = ConfigNode(config(folder, steps, dtype, size))
    recipe = TrainFinetuneRecipeForNextTokenPrediction(options)
    recipe.setup()
    (model,), seen = recipe.model_parts, []
    log = recipe.log_train_metrics
    recipe.optimizer[0].register_step_pre_hook(
        lambda *_: seen.append({"gradients": gradients(model)})
    )

    def logged(data: Any) -> None:
        seen[-1] |= {"loss": float(data.metrics["loss"]), "norm": float(data.metrics["grad_norm"])}
        log(data)

    recipe.log_train_metrics = logged
    recipe.run_train_validation_loop()
    if dist.get_rank() == 0:
        torch.save(seen, folder / "seen.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    without_cuda()
    for asked in sys.argv[1:]:
        place, number, kind = asked.split(":")
        run(Path(place), int(number), kind, int(os.environ.get("WORLD_SIZE", "1")))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # gloo's threads, still running, now and then abort a process on its usual way out
