"""The mixers as functions, which the layers of this package and of transformers share.

What differs between the two is handed in: how a projection is called, which form of the ops runs,
and what stands for the tokens before, a state of the cache in use.

Letters: T packed tokens, D hidden size, H query heads, J key/value heads, P head width, K experts a
token, X width the experts see; of the Mamba-2 mixer: G groups, N state.
"""

from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nemotron_v3 import ops as eager_ops
from nemotron_v3.layers import graph_ops
from nemotron_v3.layers.linear import project as call_projection
from nemotron_v3.layers.mamba2_by_modules import mamba2_by_modules as call_modules
from nemotron_v3.layout import SequenceLayout

Projection = Callable[[nn.Module, Tensor], Tensor]


def attention_mixer(
    x: Tensor,
    layer: Any,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    project: Projection = call_projection,
) -> Tensor:
    """Project, attend, project.

    Args:
        x: `[T, D]`.
        layer: holds `q_proj`, `k_proj`, `v_proj`, `o_proj` and `head_dim`.
        attend: queries `[T, H, P]`, keys and values `[T, J, P]` -> `[T, H, P]`; with a cache it
            appends keys and values and attends to all that is held.
        project: calls a projection.

    Returns:
        `[T, D]`.
    """
    q = project(layer.q_proj, x).unflatten(-1, (-1, layer.head_dim))  # [T, H, P]
    k = project(layer.k_proj, x).unflatten(-1, (-1, layer.head_dim))  # [T, J, P]
    v = project(layer.v_proj, x).unflatten(-1, (-1, layer.head_dim))
    return project(layer.o_proj, attend(q, k, v).flatten(-2))


def moe_mixer(
    x: Tensor,
    layer: Any,
    route: Callable[[Tensor], tuple[Tensor, Tensor]],
    experts: Callable[[Tensor, Tensor, Tensor], Tensor | Callable[[], Tensor]],
    *,
    project: Projection = call_projection,
) -> Tensor:
    """The weighted sum of each token's experts, and the shared expert, which sees every token.

    Args:
        x: `[T, D]`.
        layer: holds `fc1_latent_proj`, `fc2_latent_proj` and `shared_experts`, each a module or
            None.
        route: tokens -> weights and expert numbers `[T, K]`.
        experts: `[T, X]`, expert numbers and weights -> `[T, X]`, or a function that gives it: for
            the tokens to arrive somewhere while the shared expert is computed.
        project: calls a projection, or the shared expert, which is several.

    Returns:
        `[T, D]`.
    """
    weights, indices = route(x)
    latent = x if layer.fc1_latent_proj is None else project(layer.fc1_latent_proj, x)
    y, shared, beside = experts(latent, indices, weights), layer.shared_experts, None
    if not isinstance(y, Tensor):
        beside = None if shared is None else project(shared, x)
        y = y()
    if layer.fc2_latent_proj is not None:
        y = project(layer.fc2_latent_proj, y)
    if shared is None:
        return y
    return y + (project(shared, x) if beside is None else beside)


class Mamba2Sizes(NamedTuple):
    """Of a mixer, as `ops.mamba2` names them; `taps` are the convolution's."""

    n_groups: int
    head_dim: int
    state_size: int
    dt_limit: tuple[float, float]
    chunk_size: int
    eps: float
    taps: int
    impl: str


class RecurrentState(Protocol):
    """The conv and SSM states of a layer, in whatever cache holds them."""

    @property
    def has_graph(self) -> bool:
        """Whether a backward pass may come through the states."""
        ...

    def for_one_token(self) -> tuple[Tensor, Tensor] | None:
        """Both states, for an op that writes the next ones into them; None unless every row holds
        states already, which no graph needs, and gets one token."""
        ...

    def pieces(self) -> Iterable[tuple[Tensor | None, SequenceLayout]]:
        """The tokens to scan one after the other: their places (None: all), and how they lie."""
        ...

    def read(self, tokens: Tensor, in_graph: bool) -> dict[str, Any]:
        """What an op is told of the tokens before a piece: `conv_states` and `ssm_states`, or
        nothing where they are fresh; `return_final_states=False` where nobody asks what it ends
        with; an `exchange`, where that happens elsewhere.

        Args:
            tokens: `[T, 2*H*P + 2*G*N + H]`, the piece's own.
            in_graph: whether a backward pass follows.
        """
        ...

    def write(self, conv: Tensor, ssm: Tensor) -> None:
        """The states after a piece; None twice where nobody asks."""
        ...

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What came out of several pieces, token by token as they were given."""
        ...


def mamba2_mixer(
    x: Tensor,
    layer: Any,
    weights: tuple[Tensor | None, ...] | None,
    sizes: Mamba2Sizes,
    layout: SequenceLayout,
    state: RecurrentState | None = None,
    *,
    project: Projection = call_projection,
    ops: ModuleType = eager_ops,
    by_modules: Callable[..., tuple[Any, ...]] = call_modules,
    act: Callable[[Tensor], Tensor] = nn.functional.silu,
    local: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Project, convolve, scan, gate and normalise, project (arXiv 2405.21060).

    Args:
        x: `[T, D]`.
        layer: holds `in_proj`, `conv1d`, `dt_bias`, `A_log`, `D`, `norm` and `out_proj`.
        weights: of the convolution, the scan and the norm as `ops.mamba2` takes them; None where
            `conv1d` or `norm` have to be called.
        layout: where the documents start.
        state: what the tokens follow, which is moved on; None starts each document anew.
        project: calls a projection.
        ops, by_modules: what computes.
        act: of what is convolved, where the modules are called.
        local: gives what the scan reads in place of a tensor of the layer's own, where the modules
            are called; None is the tensor itself.

    Returns:
        `[T, D]`.
    """
    zxbcdt = project(layer.in_proj, x)  # [T, 2*H*P + 2*G*N + H]
    trained = (
        state is not None
        and torch.is_grad_enabled()
        and any(tensor.requires_grad for tensor in (zxbcdt, *layer.parameters()))
    )
    if state is not None and weights is not None and not trained:
        states = state.for_one_token()
        if states is not None:
            y = ops.mamba2_step(
                zxbcdt,
                *weights,
                conv_state=states[0],
                ssm_state=states[1],
                n_groups=sizes.n_groups,
                head_dim=sizes.head_dim,
                state_size=sizes.state_size,
                dt_limit=sizes.dt_limit,
                eps=sizes.eps,
                impl=sizes.impl,
            )
            return project(layer.out_proj, y)

    def scan(tokens: Tensor, layout: SequenceLayout, **states: Any) -> tuple[Any, ...]:
        settings = {
            "n_groups": sizes.n_groups,
            "head_dim": sizes.head_dim,
            "state_size": sizes.state_size,
            "dt_limit": sizes.dt_limit,
            "chunk_size": sizes.chunk_size,
            "impl": sizes.impl,
            "layout": layout,
        }
        if weights is not None:
            compiling = torch.compiler.is_compiling() and ops is eager_ops
            as_node = compiling and state is None and graph_ops.can_take(layout)
            run = graph_ops.mamba2 if as_node else ops.mamba2
            return run(tokens, *weights, eps=sizes.eps, **settings, **states)
        of_heads = layer.dt_bias, layer.A_log, layer.D
        return by_modules(
            tokens,
            layer.conv1d,
            layer.norm,
            *(of_heads if local is None else map(local, of_heads)),
            taps=sizes.taps,
            act=act,
            **settings,
            **states,
        )

    if state is None:
        y, _, _ = scan(zxbcdt, layout, return_final_states=False)
        return project(layer.out_proj, y)
    in_graph, parts = trained or state.has_graph, []
    for places, piece in state.pieces():
        tokens = zxbcdt if places is None else zxbcdt.index_select(0, places)
        y, conv, ssm = scan(tokens, piece, **state.read(tokens, in_graph))
        state.write(conv, ssm)
        parts.append(y)
    y = parts[0] if len(parts) == 1 else state.in_order(parts)
    return project(layer.out_proj, y)
