"""Course of the learning rate, per optimizer step."""

import math

from unimega.config.schema import OptimizerConfig


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Rate of step ``step`` (from 0) of ``steps``: linear warm-up to ``lr``, then the schedule down to ``min_lr``.

    cosine and linear fall from the end of the warm-up to the end of the run; wsd stays at ``lr`` and falls linearly
    over the last ``decay_share`` of the run; constant stays. ``min_lr`` is where the fall would be at step ``steps``.
    """
    high, low, warmup = optimizer.lr, optimizer.min_lr, optimizer.warmup_steps
    if step < warmup:
        return high * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return high
    falling = math.ceil(round(optimizer.decay_share * steps, 6))  # 0.07 of 100 steps is 7.000000000000001 otherwise
    start = warmup if optimizer.schedule != "wsd" else max(warmup, steps - falling)
    progress = min(1.0, max(0, step - start) / max(1, steps - start))
    fall = 0.5 + 0.5 * math.cos(math.pi * progress) if optimizer.schedule == "cosine" else 1 - progress
    return low + (high - low) * fall
