"""The ops as `torch.compile` is to see them: calls that it makes and does not look into.

They work out index tables on the host from the lengths of documents, which a graph would be
compiled anew for. What lies between them, projections and norms, is compiled.
"""

import torch

from nemotron_v3 import ops
from nemotron_v3.layers import mamba2_by_modules as by_modules
from nemotron_v3.model import loss

attention = torch.compiler.disable(ops.attention)
cached_attention = torch.compiler.disable(ops.cached_attention)
cross_entropy = torch.compiler.disable(ops.cross_entropy)
experts = torch.compiler.disable(ops.experts)
linear_cross_entropy = torch.compiler.disable(ops.linear_cross_entropy)
mamba2 = torch.compiler.disable(ops.mamba2)
mamba2_by_modules = torch.compiler.disable(by_modules.mamba2_by_modules)
mamba2_step = torch.compiler.disable(ops.mamba2_step)
router = torch.compiler.disable(ops.router)
refuse_stray_label = torch.compiler.disable(loss.refuse_stray_label)
targets_of = torch.compiler.disable(loss.targets_of)
