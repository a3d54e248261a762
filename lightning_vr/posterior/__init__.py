"""The posterior mean E[x0 | x_t] under references. It imports ``core``.

A softmax streamed over references, which are prepared once and may be sharded over the ranks.
"""

from lightning_vr.posterior.posterior_mean import Posterior, posterior_mean
from lightning_vr.posterior.references import References
from lightning_vr.posterior.sharded_references import ShardedReferences
from lightning_vr.posterior.stored_references import StoredReferences

__all__ = [
    "Posterior",
    "References",
    "ShardedReferences",
    "StoredReferences",
    "posterior_mean",
]
