"""Launches of Triton kernels that cost little of the host's time.

Triton looks a launch up by the type, the alignment and the divisibility of every argument, in some
twenty microseconds. Here most of that is known from the order of the parameters, and the compiled
kernel is found by what is left.
"""

from typing import Any

import torch
from torch import Tensor

from nemotron_v3.ops import compat
from nemotron_v3.ops.common.host import interpreted

Number = int | float


class Launcher:
    """Launches `kernel`, whose parameters are tensors, then numbers, then constants."""

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.compiled: dict[tuple, Any] = {}
        # Whether Triton compiles for a parameter's value (ops/common/jit.py).
        self.by_value: list[bool] = (
            [] if interpreted() else [not p.do_not_specialize for p in kernel.params]
        )

    def __call__(
        self,
        programs: int,
        tensors: tuple[Tensor | None, ...],
        numbers: tuple[Number, ...],
        constants: tuple[Any, ...],
        warps: int = 4,
        also: tuple[tuple[tuple[Any, ...], int], ...] = (),
    ) -> None:
        """Launch on the current device and stream.

        Args:
            programs: size of the grid.
            tensors: on the current device; None where there is none.
            numbers: what may change from call to call: ints and floats.
            constants: what the kernel is compiled for.
            warps: of a program.
            also: constants and warps that a later call may come with, for other lengths. They are
                compiled at the first one, where a pause is expected.
        """
        if interpreted() or torch.version.hip:  # where Triton looks at sizes of tensors too
            self.kernel[(programs,)](*tensors, *numbers, *constants, num_warps=warps)
            return
        pointers, kinds, bits = [], [], 0
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                kinds.append(None)
            else:
                pointer = tensor.data_ptr()
                pointers.append(pointer)
                kinds.append(tensor.dtype)
                bits |= pointer
        if bits % 16:  # Triton compiles for each tensor whether it begins at a multiple of 16 bytes
            kinds += [pointer is not None and pointer % 16 for pointer in pointers]
        # So it does for numbers: more than 32 bits, and, by value, multiples of 16 and 1.
        by_value = self.by_value[len(tensors) : len(tensors) + len(numbers)]
        for n, looks in zip(numbers, by_value, strict=True):
            kinds.append((n.__class__, n > 2147483647, looks and (n % 16 == 0, n == 1)))
        device = tensors[0].device.index
        key = (device, warps, constants, *kinds)
        found = self.compiled.get(key)
        if found is None:
            for later, its_warps in also:
                options = {"grid": (programs,), "num_warps": its_warps}
                self.kernel.warmup(*tensors, *numbers, *later, **options)
            compiled = self.kernel[(programs,)](*tensors, *numbers, *constants, num_warps=warps)
            self.compiled[key] = compiled, compiled.run, compiled.function, compiled.packed_metadata
        elif compat.launch_is_hooked():
            found[0][(programs, 1, 1)](*pointers, *numbers, *constants)
        else:
            # What `compiled[grid]` does, less the metadata and the empty chains of hooks.
            _, run, function, packed = found
            stream = compat.current_raw_stream(device)
            nobody = None, None, None
            run(programs, 1, 1, stream, function, packed, *nobody, *pointers, *numbers, *constants)
