"""The tables of a preflight's prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kangaroo_jax.engine.part_costs import PartTimes
    from kangaroo_jax.preflight.prediction import Prediction


def print_prediction(prediction: Prediction) -> None:
    """Prints the parts with their predicted times, and in decoding the speed-ups that follow."""
    limits, first = prediction.limits, prediction.parts[0]
    counted = any(part.kernels for part in prediction.parts)
    estimated = any(part.cycles for part in prediction.parts)
    print(
        f"\npredicted, not measured, of each device at {limits.share * limits.bandwidth / 1e9:.0f} GB/s and "
        f"{limits.products[prediction.dtype] / 1e12:.0f} TFLOP/s"
    )
    if counted:
        print(f"and {limits.launch * 1e6:.1f} us to start a kernel, {limits.turn * 1e3:.2f} ms for a draft step's loop")
    print("(docs/preflight.md has the model, and its error where that is known)")
    heading = f"{'part':24}{'GB':>9}{'GFLOP':>11}" + (f"{'kernels':>9}" if counted else "")
    heading += f"{'ms':>10}{'of plain':>10}" if prediction.times else f"{'ms':>10}"
    if estimated:
        heading += f"{'Mcycles':>10}{'of plain':>10}" + (f"{'ms':>10}" if limits.clock else "")
    print(heading)
    for part in prediction.parts:
        line = f"{part.name:24}{part.num_bytes / 1e9:9.3f}{part.operations / 1e9:11.1f}"
        line += f"{part.kernels or '':>9}" if counted else ""
        line += f"{part.seconds * 1e3:10.3f}" + (f"{part.seconds / first.seconds:10.3f}" if prediction.times else "")
        if part.cycles and first.cycles:
            line += f"{part.cycles / 1e6:10.2f}{part.cycles / first.cycles:10.3f}"
            line += f"{part.cycles / limits.clock * 1e3:10.3f}" if limits.clock else ""
        print(line)
    made = "plain decoding" if prediction.times else "training"
    print(f"{made}: {prediction.tokens / first.seconds:,.0f} tokens per second")
    if prediction.times is not None:
        _print_speedups(prediction, prediction.times, "by these limits")
    if prediction.cycles is not None:
        _print_speedups(prediction, prediction.cycles, "by the compiler's cycles")


def _print_speedups(prediction: Prediction, times: PartTimes, by: str) -> None:
    from kangaroo_jax.cli.speedup_table import print_speedups

    cost = times.round_cost(prediction.max_draft_len)
    print(f"\n{by}, a round of {prediction.max_draft_len} costs {cost:.2f} plain steps; speed-up over plain decoding:")
    print_speedups(times, prediction.max_draft_len)
