"""What the factors of a contraction have in common: examples, and what is summed over."""

from torch import Tensor

from gnsfx._torch import known


def same_leading(count: int, *factors: Tensor) -> None:
    """Raise ValueError where the first ``count`` sizes of some factors differ; symbolic ones may.

    Slices beyond the end of a tensor are empty, so that sums would leave out examples without a word.
    """
    first, *others = ([*t.shape[:count]] for t in factors)
    for other in others:
        if len(other) != len(first) or any(known(a != b) for a, b in zip(first, other, strict=True)):
            raise ValueError(
                f"the first {count} sizes of all factors must be the same, got {[[*t.shape] for t in factors]}"
            )
