"""The table of ops: what each one is made of, and which of its implementations runs.

Every `op.py` builds its `Op` once and registers its public function with it. Reports, the
self-check and what hides ops from a compiler read this table.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemotron_v3.ops import compat
from nemotron_v3.ops.common import host, selfcheck
from nemotron_v3.ops.common.precision import without_autocast
from nemotron_v3.ops.common.selfcheck import Check

IMPLS = ("auto", "reference", "portable", "triton")

OPS: dict[str, "Op"] = {}
FUNCTIONS: dict[str, Callable[..., Any]] = {}  # the public function of each op

_log = logging.getLogger("nemotron_v3")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True, eq=False)
class Op:
    """One op and its implementations.

    Attributes:
        name: of its public function.
        reference: step by step, in fp64.
        portable: plain PyTorch.
        kernels: imports the Triton implementation and returns it; None where there is none.
        refuse: why the kernels cannot take a call, or None. It is given the dtypes of the call's
            tensors, None for an absent one, and then the call's sizes.
        check: what an implementation is checked with at its first use; None for no check.
        kernels_case: the case to check the kernels with, from a call's sizes, so that nothing is
            compiled for the check alone; None for no check of the kernels.
        special: implementations that only some ops have, by the `impl` that asks for them.
    """

    name: str
    reference: Callable[..., Any]
    portable: Callable[..., Any]
    kernels: Callable[[], Callable[..., Any]] | None = None
    refuse: Callable[..., str | None] | None = None
    check: Check | None = None
    kernels_case: Callable[..., Any] | None = None
    special: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    _picked: dict[Hashable, Callable[..., Any]] = field(default_factory=dict, repr=False)
    _passed: set[Hashable] = field(default_factory=set, repr=False)

    def public(self, function: _Function) -> _Function:
        """Enter the op into the table, with its public function.

        Raises:
            ValueError: an op of this name is there already.
        """
        if self.name in OPS:
            raise ValueError(f"{self.name} is registered twice")
        OPS[self.name], FUNCTIONS[self.name] = self, function
        return function

    def pick(
        self, impl: str, tensors: tuple[Tensor | None, ...], *sizes: Hashable
    ) -> Callable[..., Any]:
        """The implementation that computes a call of the op, outside autocast.

        It is worked out, and checked, once: for each `impl`, device and dtype of the first tensor,
        and where kernels come into question for all dtypes and sizes.

        Args:
            impl: "auto" takes the kernels on a GPU; where they refuse, it says so once.
            tensors: those of the call, of which the first is present.
            sizes: what `refuse` and `kernels_case` read of the call. Nothing among them may differ
                from batch to batch.

        Raises:
            ValueError: an unknown `impl`.
            RuntimeError: `impl="triton"` for an op that has no Triton form, or where it cannot run;
                a form that is asked for by name inside a transform of torch.func that cannot
                reach it; one that computes wrong numbers.
        """
        like = tensors[0]
        assert like is not None
        compiling = torch.compiler.is_compiling()
        in_transform = not compiling and compat.current_transform() is not None
        if in_transform and compat.in_derivative_or_batch():
            impl = self._under_transforms(impl)
        asks_kernels = impl == "triton" or (impl == "auto" and like.is_cuda)
        dtypes = [None if t is None else t.dtype for t in tensors] if asks_kernels else ()
        if compiling:  # a compiler does not see what is remembered
            picked = self._implementation(self._resolve(impl, like.device, dtypes, sizes))
        else:
            key = (impl, like.device, like.dtype)
            if asks_kernels:
                key = (*key, *dtypes, *sizes)
            picked = self._picked.get(key)
            if picked is None:
                picked = self._first_pick(key, impl, like, dtypes, sizes)
        return without_autocast(picked) if compat.autocast_somewhere() else picked

    def _first_pick(
        self, key: Hashable, impl: str, like: Tensor, dtypes: Any, sizes: tuple
    ) -> Callable[..., Any]:
        """`pick` where nothing is remembered under `key` yet; what has passed its check is now."""
        name = self._resolve(impl, like.device, dtypes, sizes)
        if impl == "auto":
            _say_once(self.name, name)
        function, case = self._implementation(name), None
        is_compiled = name == "triton"
        if is_compiled and self.kernels_case is not None:
            case = self.kernels_case(*sizes)
        trusted = name == "reference" or (is_compiled and case is None)
        if trusted or self.has_passed(name, function, like, case):
            self._picked[key] = function
        return function

    def choose(self, impl: str, like: Tensor) -> tuple[str, str]:
        """The name of the form that `impl` means for tensors such as `like`, and why.

        Raises:
            ValueError, RuntimeError: see `pick`.
        """
        if self.kernels is None or impl not in ("auto", "triton"):
            why = f"impl={impl!r}"
            return self._plain(
                impl
            ), why if impl != "auto" else f"{why}, and there is no other form"
        if impl == "triton" or (like.is_cuda and host.can_launch(like.device)):
            return "triton", f"impl={impl!r}, on a GPU"
        why = "triton is not installed" if like.is_cuda else "not on a GPU"
        return "portable", f"impl='auto': {why}"

    def _resolve(self, impl: str, device: torch.device, dtypes: Any, sizes: tuple) -> str:
        """The name of the form; `dtypes` are empty where no kernels come into question."""
        if self.kernels is None or not dtypes:
            return self._plain(impl)
        if not host.can_launch(device):
            refusal = f"it needs a GPU and the package triton, the tensors are on {device}"
        else:
            refusal = None if self.refuse is None else self.refuse(dtypes, *sizes)
        if refusal is None:
            return "triton"
        if impl == "triton":
            raise RuntimeError(
                f"{self.name}: the Triton form cannot run here: {refusal}; use impl='auto' or "
                "impl='portable'"
            )
        if not torch.compiler.is_compiling():
            _warn_once(self.name, refusal)
        return "portable"

    def _plain(self, impl: str) -> str:
        """The name of the form that `impl` means where there are no kernels."""
        if impl in ("reference", "portable") or impl in self.special:
            return impl
        if impl == "auto":
            return "portable"
        if impl == "triton":
            raise RuntimeError(
                f"{self.name} has no Triton form: use impl='auto' or impl='portable'"
            )
        raise ValueError(f"impl must be one of {', '.join((*IMPLS, *self.special))}, got {impl!r}")

    def _implementation(self, name: str) -> Callable[..., Any]:
        if name == "triton":
            assert self.kernels is not None
            return self.kernels()
        if name in self.special:
            return self.special[name]
        return self.reference if name == "reference" else self.portable

    def has_passed(
        self, name: str, function: Callable[..., Any], like: Tensor, case: Any = None
    ) -> bool:
        """Whether an implementation is checked on the device and dtype of `like`; if it can be, it
        is now. False leaves the check for a later call.

        Args:
            name: of the implementation.
            function: computes it.
            case: of the op's `cases.py`; None is that of `check`.

        Raises:
            RuntimeError: it computes wrong numbers; at each call.
        """
        if self.check is None:
            return True
        key = (name, case, like.device, like.dtype)
        if key not in self._passed and selfcheck.can_check(like):
            selfcheck.check(self, name, function, like.device, like.dtype, case)
            self._passed.add(key)
        return key in self._passed

    def _under_transforms(self, impl: str) -> str:
        """The form inside a transform of torch.func: the reference, or an error."""
        if impl == "auto":
            _say_reference_once(self.name)
        elif impl != "reference":
            raise RuntimeError(
                f"{self.name}: torch.func (grad, vjp, jvp, vmap) cannot transform impl={impl!r}: "
                "use torch.autograd.grad instead, or impl='reference'"
            )
        return "reference"


def choose(op: str, impl: str, like: Tensor) -> tuple[str, str]:
    """The name of the form of `op` that `impl` means for tensors such as `like`, and why.

    Raises:
        ValueError, RuntimeError: see `Op.pick`.
    """
    return OPS[op].choose(impl, like)


@functools.cache
def _say_reference_once(op: str) -> None:
    _log.warning(
        "%s: the step-by-step reference runs, which is slow: torch.func can transform no other "
        "form; torch.autograd.grad takes the fast ones",
        op,
    )


@functools.cache
def _warn_once(op: str, refusal: str) -> None:
    _log.warning("%s: the slower portable form runs, not the Triton form: %s", op, refusal)


@functools.cache
def _say_once(op: str, form: str) -> None:
    _log.info("%s: impl='auto' takes the %s form", op, form)
