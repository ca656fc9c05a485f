"""Whether a noisy curve still falls."""

from collections.abc import Sequence

import numpy as np

LEAST = 40
"""Values of the shortest curve of which anything can be said."""
BLOCKS = 40
SIGNIFICANCE = 2.33
"""Standard errors of Mann and Kendall's statistic: one settled curve in a hundred is taken for a falling one."""
SMALLEST = 0.05
"""The smallest fall that matters, as a share of the curve's level."""


def still_falls(values: Sequence[float]) -> bool | None:
    """Return whether the second half of a curve falls beyond its noise; None if it is too short to tell.

    A step's diffusion loss hangs on its noise level far more than on what was learned: from step to step it
    varies by about half of its mean, so that means of a few dozen steps differ by a tenth in any case. Hence
    the test of Mann (1945) and Kendall (1975) for a trend, which counts how many pairs of values fall and how
    many rise, on means of blocks of steps; and Theil and Sen's slope, the median of those of all pairs, for how
    much it falls.

    Args:
        values: one value a step.
    """
    if len(values) < LEAST:
        return None
    half = np.asarray(values[len(values) // 2 :], dtype=float)
    means = np.array([block.mean() for block in np.array_split(half, min(BLOCKS, len(half)))])
    count = len(means)
    i, j = np.triu_indices(count, 1)
    differences = means[j] - means[i]
    score = np.sign(differences).sum() / np.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    fall = -np.median(differences / (j - i)) * (count - 1)
    return bool(score < -SIGNIFICANCE and fall > SMALLEST * abs(np.median(means)))
