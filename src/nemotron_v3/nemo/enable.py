"""`enable`: every Nemotron-H model that NeMo AutoModel builds from now on is accelerated.

Its class is changed where it is built, in `__init__`: whoever builds one, a recipe,
`NeMoAutoModelForCausalLM` or a checkpoint's loader, has the layers in place before the model is
wrapped, sharded and loaded.
"""

from functools import wraps
from typing import Any

from nemotron_v3.nemo.accelerate import accelerate
from nemotron_v3.nemo.versions import check_version
from nemotron_v3.ops.registry import IMPLS

_BUILDS = "nemotron_v3_builds"  # on an `__init__` of ours: theirs


def enable(*, impl: str = "auto") -> None:
    """Accelerate every Nemotron-H model that NeMo AutoModel builds in this process from now on.

    Args:
        impl: which form of each op runs, see `nemotron_v3.ops`. A second call changes it.

    Raises:
        ImportError: a NeMo AutoModel outside the supported versions.
        ValueError: an unknown form.
    """
    check_version()
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is not offered: one of {', '.join(map(repr, IMPLS))}")
    kind = _model_class()
    disable()
    theirs = kind.__init__

    @wraps(theirs)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        accelerate(self, impl=impl)

    setattr(init, _BUILDS, theirs)
    kind.__init__ = init


def disable() -> None:
    """Let NeMo AutoModel build its models as its own again; those that are built stay as they are.

    Raises:
        ImportError: NeMo AutoModel is not installed.
    """
    kind = _model_class()
    theirs = getattr(kind.__init__, _BUILDS, None)
    if theirs is not None:
        kind.__init__ = theirs


def backend(*, impl: str = "auto", **options: Any) -> Any:
    """`enable`, and AutoModel's `BackendConfig` with these options: the line of a recipe file.

    In the place of `_target_: nemo_automodel.components.models.common.BackendConfig`, in a model's
    section, stands `_target_: nemotron_v3.nemo.backend`; the options beside it stay.

    Args:
        impl: see `enable`.
        **options: of AutoModel's `BackendConfig`.

    Returns:
        Its `BackendConfig`.
    """
    from nemo_automodel.components.models.common import (  # pyright: ignore[reportMissingImports]
        BackendConfig,
    )

    made = BackendConfig(**options)
    enable(impl=impl)
    return made


def _model_class() -> type:
    check_version()
    from nemo_automodel.components.models.nemotron_v3 import (  # pyright: ignore[reportMissingImports]
        model,
    )

    return model.NemotronHForCausalLM
