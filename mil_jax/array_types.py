"""Shape letters and array aliases used across the package.

B batch, L length, T new tokens, D d_model, H query heads, K key/value heads, P head_dim,
N d_state, E d_inner (H * P), X d_xb (K * P), R dt_rank, W conv width, F d_ff, V vocabulary,
G groups of B or C, S cache slots.
"""

from typing import TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = jax.Array | np.ndarray

# A model's weights: one entry per tensor and layer, named by its dotted path, for example
# "layers.3.attn.q_proj.kernel". Matrices are [in, out]. Checkpoints, surgery and export all
# work on this one type; stacking for scanned layers happens in `models.decoder` alone.
Params: TypeAlias = dict[str, ArrayLike]
