"""How much is pruned in each of several sub-steps."""

from __future__ import annotations

SCHEDULES = ("linear", "geometric")


def sub_targets(present: float, target: float, steps: int, schedule: str) -> list[float]:
    """Sparsities after each sub-step, from the present one to the target.

    "linear" takes the same number of weights in each sub-step (as published for oBERT's
    recomputations); "geometric" takes the same share of what is left, so that the last ones,
    where every weight counts, are the smallest.

    Raises:
        ValueError: no such schedule, or not at least one step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    if present >= target:
        return [target] * steps
    left, least = 1 - present, 1 - target
    shares = [(i + 1) / steps for i in range(steps - 1)]
    if schedule == "linear" or least <= 0:
        return [present + (target - present) * share for share in shares] + [target]
    return [1 - left * (least / left) ** share for share in shares] + [target]
