"""Compiles what a call would launch, for GPUs that are not there.

Run in a process that has not chosen Triton's interpreter. Tensors are on the meta device.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

KINDS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
OPTIONS = ("num_warps", "num_stages", "launch_pdl")


@contextmanager
def launches(found: list[tuple[ASTSource, dict[str, int]]]) -> Iterator[None]:
    """Inside, a launch of a kernel adds its source and options to `found` and does nothing."""
    original = JITFunction.__getitem__

    def get(self: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in OPTIONS if name in named}
            bound = dict(zip(self.arg_names, args, strict=False)) | named
            found.append((source(self, bound), options))

        return launch

    JITFunction.__getitem__ = get
    try:
        yield
    finally:
        JITFunction.__getitem__ = original


def source(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """A kernel specialised as Triton's own launcher does for these arguments."""
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        fixed = kernel.params[place].is_constexpr or value is None
        if fixed or (isinstance(value, int) and not isinstance(value, bool) and value == 1):
            signature[name], constants[(place,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = KINDS[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
        if aligned and not kernel.params[place].do_not_specialize:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def needs(source: ASTSource, options: dict[str, int], capability: int) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of a kernel on one kind of GPU."""
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [tool, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return {
        "kernel": source.fn.__name__,
        "registers": int(registers),
        "spilled": int(stack),
        "shared": made.metadata.shared,
    }
