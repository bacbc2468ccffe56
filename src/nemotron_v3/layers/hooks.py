"""Whether a module has to be called, or an op may read its weights and do its work.

Some modules are there for their weights: an op computes a projection faster, fuses a convolution
and a norm with what stands between them, or lays a whole decode step out once. Whoever looks into
such a module, or has changed what it computes, must not be passed by. Everything that asks whether
a call can be left out asks here.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def must_call(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a call of `module` may do more than the `forward` of one of `kinds` does.

    Those are exact classes: a subclass, an adapter, a wrapper, a quantised or parametrized module
    or a class that a sharder has made is another one.
    """
    return type(module) not in kinds or is_observed(module)


def is_observed(*modules: nn.Module, by_its_forward: bool = True) -> bool:
    """Whether something else is to happen at a call of one of `modules` than its class says.

    That is a hook, its own or one of all modules (as profilers and tools for activations set them),
    or another `forward` on the module itself.

    Args:
        by_its_forward: False leaves that `forward` out, for a caller who knows what it does.
    """
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or (by_its_forward and "forward" in vars(module))
        ):
            return True
    return bool(_has_any_global_hook())
