"""Learning-rate schedules: functions from progress in [0, 1] to a multiplier of the learning rate."""

import math


def constant(progress: float) -> float:
    """1 throughout."""
    return 1.0


def linear(progress: float, start: float = 1.0, final: float = 0.0) -> float:
    """From `start` in a straight line to `final`: for weights of terms of knowledge, too."""
    return start + (final - start) * progress


def cosine(progress: float, warmup: float = 0.1, final: float = 0.01) -> float:
    """Rise linearly to 1 over the first `warmup` of the steps, then fall as half a cosine to `final`."""
    if progress < warmup:
        return progress / warmup
    fraction = (progress - warmup) / (1 - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * fraction))


def decay(progress: float, final: float = 0.1) -> float:
    """Fall exponentially from 1 to `final`."""
    return float(final**progress)


def warmup(progress: float, share: float = 0.1) -> float:
    """Rise linearly to 1 over the first `share` of the steps, then stay there: for weights of terms of knowledge."""
    return progress / share if progress < share else 1.0
