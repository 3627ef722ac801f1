"""Normalisation."""

from functools import partial

import flax.linen as nn

# The two-pass variance: E[x^2] - E[x]^2 loses digits where |mean| is far above the deviation.
LayerNorm = partial(nn.LayerNorm, use_fast_variance=False)
