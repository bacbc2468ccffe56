"""What context parallelism over heads would send, beside what ours does: another way, which
docs/long-sequences.md compares it with."""

from nemotron_v3.config import NemotronV3Config


def all_to_all_over_heads(config: NemotronV3Config, tokens: int, width: int, processes: int) -> int:
    """Bytes that a process sends forward and backward where a mixer shares heads instead.

    Each process gets z, x, B, C and the step sizes of its heads for all tokens, and sends the
    output of all tokens back. Groups of B and C that several need are sent to each.
    """
    H, P = config.mamba_num_heads, config.mamba_head_dim
    groups = max(config.n_groups, processes)
    elements = 2 * H * P + 2 * groups * config.ssm_state_size + H + H * P
    return 2 * tokens * elements * (processes - 1) // processes * width
