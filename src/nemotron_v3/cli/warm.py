"""`nemotron-v3 warm`: kernels of a checkpoint's model compiled before they are needed."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from nemotron_v3.cli.dtypes import DTYPES, dtype_name
from nemotron_v3.cli.inspect import RELEASED, read_target
from nemotron_v3.cli.options import Choices


@dataclass(frozen=True, kw_only=True)
class Warm:
    """Compile the kernels that generation from a checkpoint launches on an NVIDIA GPU.

    They stay in Triton's cache (TRITON_CACHE_DIR), where later processes find them. The weights are
    not read: kernels depend on the config alone.
    """

    target: Annotated[tyro.conf.Positional[str], Choices(RELEASED)]
    """name of a released model or its id on the hub, a folder with a config.json, or a JSON file"""
    rows: tuple[int, ...] = (1,)
    """numbers of rows to come"""
    length: int = 1024
    """tokens that a row may get to"""
    sample: bool = True
    """also for tokens that are drawn, with top-p, as generate draws them; with no-sample for
    the likeliest alone"""
    device: str = "cuda"
    """cuda, cuda:1, ..."""
    dtype: Annotated[str | None, Choices(tuple(DTYPES))] = None
    """of the weights: bfloat16, float16 or float32; the config's by default"""

    def run(self) -> None:
        import torch

        from nemotron_v3.generation.warm import warm
        from nemotron_v3.model.model import NemotronV3ForCausalLM

        if torch.device(self.device).type != "cuda" or not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: kernels are compiled on an NVIDIA GPU")
        config = read_target(self.target)
        dtype = config.dtype if self.dtype is None else getattr(torch, dtype_name(self.dtype))
        with torch.device(self.device):
            model = NemotronV3ForCausalLM(config.replace(dtype=dtype)).eval()
        model.requires_grad_(False)
        seconds = warm(model, self.rows, length=self.length)
        if self.sample:
            seconds += warm(model, self.rows, length=self.length, do_sample=True, top_p=0.95)
        print(f"compiled in {seconds:.1f} s")
