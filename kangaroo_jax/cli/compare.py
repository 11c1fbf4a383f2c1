"""Speeds of one or two ways of decoding a prompt, as a table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kangaroo_jax import Generation

_RUNS = 3


def summary(
    new_tokens: int,
    accept_lengths: Sequence[int],
    draft_lengths: Sequence[int],
    lookup_lengths: Sequence[int],
    seconds: float,
) -> dict[str, Any]:
    """What the table and --json show of one way of decoding: an answer's tokens, and its rounds'."""
    return {
        "new_tokens": new_tokens,
        "seconds": round(seconds, 4),
        "tokens_per_second": round(new_tokens / seconds, 2),
        "mean_accept_length": round(statistics.fmean(accept_lengths), 3) if accept_lengths else 1.0,
        "rounds": len(accept_lengths),
        "lookup_rounds": sum(map(bool, lookup_lengths)),
        "plain_rounds": sum(
            not steps and not found for steps, found in zip(draft_lengths, lookup_lengths, strict=True)
        ),
        "draft_steps": sum(draft_lengths),
    }


def _summary(result: Generation, seconds: float) -> dict[str, Any]:
    lengths = (result.accept_lengths[0], result.draft_lengths[0], result.lookup_lengths[0])
    return summary(len(result.tokens[0]), *lengths, seconds)


def print_table(columns: dict[str, dict[str, Any]]) -> None:
    """Prints a column for each way of decoding."""
    first = next(iter(columns.values()))
    rows = list(first)
    if not any(column["lookup_rounds"] for column in columns.values()):
        rows.remove("lookup_rounds")
    if first["plain_rounds"] in (0, first["rounds"]):
        rows.remove("plain_rounds")
    print(f"{'':20}" + "".join(f"{name:>12}" for name in columns))
    for row in rows:
        print(f"{row.replace('_', ' '):20}" + "".join(f"{column[row]:>12}" for column in columns.values()))


def compare(
    kangaroo: Callable[[], Generation], plain: Callable[[], Generation], greedy: bool, dtype: str
) -> tuple[dict[str, Any], float]:
    """Runs both ways of decoding, interleaved, and prints their medians beside each other.

    Returns:
      What --json shows, and the seconds it took to compile plain decoding.
    """
    (ours, our_seconds), (reference, plain_seconds) = _measure([kangaroo, plain])
    result, baseline = _summary(ours, our_seconds), _summary(reference, plain_seconds)
    # The two ways draw different samples from one distribution: their texts are not compared, and as their lengths may
    # differ, speeds are compared and not times.
    identical = ours.tokens == reference.tokens if greedy else None
    speedup = round(len(ours.tokens[0]) / our_seconds / (len(reference.tokens[0]) / plain_seconds), 3)
    print_table({"Kangaroo": result, "plain": baseline})
    print(f"{'speed-up':20}{speedup:>12}")
    if greedy:
        print(f"{'identical':20}{'yes' if identical else 'no':>12}")
    else:
        print(
            "one sample each, drawn with different random numbers: the texts are not expected to be the same and "
            "were not\ncompared; that both come from one distribution is what tests/decode/test_sampling.py checks"
        )
    if identical is False:
        print(_first_difference(ours.tokens[0], reference.tokens[0], dtype))
    result |= {
        "plain_tokens_per_second": baseline["tokens_per_second"],
        "speedup": speedup,
        "identical": identical,
    }
    return result, reference.seconds.compile


def _measure(ways: list[Callable[[], Generation]]) -> list[tuple[Generation, float]]:
    """The first result of each way, and the median of its seconds (prefill and decoding, without compilation)."""
    results = [[] for _ in ways]
    for _ in range(_RUNS):
        for way, done in zip(ways, results, strict=True):
            done.append(way())
    return [(done[0], statistics.median(r.seconds.prefill + r.seconds.decode for r in done)) for done in results]


def _first_difference(ours: list[int], plain: list[int], dtype: str) -> str:
    pairs = enumerate(zip(ours, plain, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(plain)))
    cause = "this is a bug; please report it" if dtype == "float32" else f"{dtype} rounds differently by matmul width"
    return f"first difference at token {place + 1} of {len(plain)}: {cause}"
