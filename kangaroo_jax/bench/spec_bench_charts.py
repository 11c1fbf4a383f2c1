"""Charts of a Spec-Bench run, as PNG files. The only module that needs matplotlib."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from kangaroo_jax.bench.spec_bench_summary import DraftPosition, TaskSummary

_COLOUR = "#2f6f8f"
_DOTS_PER_INCH = 150


def save_tasks(rows: Sequence[TaskSummary], path: str | pathlib.Path) -> None:
    """Two bars per row: Kangaroo's speed over plain decoding's, and its accept length. Rows without an answer are left
    out."""
    rows = [row for row in rows if row.questions]
    names = [f"{row.task.replace('_', ' ')} ({row.questions})" for row in rows]
    figure = Figure(figsize=(9, 3.5), dpi=_DOTS_PER_INCH, layout="constrained")
    for axes, title, values in zip(
        figure.subplots(1, 2, sharey=True),
        ("speed-up over plain decoding", "accept length (tokens per round)"),
        ([row.speedup for row in rows], [row.mean_accept_length for row in rows]),
        strict=True,
    ):
        _named(axes, title, "", "")
        bars = axes.barh(names, values, color=_COLOUR)
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.axvline(1.0, color="black", linewidth=0.8, linestyle="--")
        axes.margins(x=0.12)
    axes.invert_yaxis()  # of both
    figure.suptitle("By task (questions)")
    figure.savefig(path)


def save_accept_lengths(counts: Mapping[int, int], path: str | pathlib.Path) -> None:
    """A histogram of tokens per round, from accept length -> rounds."""
    total = sum(counts.values())
    mean = sum(length * count for length, count in counts.items()) / total
    figure, axes = _chart(f"Tokens per round (mean {mean:.2f})", "accept length", f"share of {total:,} rounds")
    bars = axes.bar(list(counts), [count / total for count in counts.values()], color=_COLOUR)
    axes.set_xticks(list(counts))
    _percent(axes, bars)
    figure.savefig(path)


def save_acceptance(positions: Sequence[DraftPosition], path: str | pathlib.Path) -> None:
    """A bar per draft position: how often its token was accepted, given that it was verified."""
    figure, axes = _chart(
        "Acceptance by draft position", "position in the draft\n(times verified)", "accepted, of those verified"
    )
    places = [position.position for position in positions]
    bars = axes.bar(places, [position.acceptance for position in positions], color=_COLOUR)
    axes.set_xticks(places, [f"{position.position}\n({position.verified:,})" for position in positions])
    _percent(axes, bars)
    figure.savefig(path)


def _chart(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    # A Figure without pyplot needs no display.
    figure = Figure(figsize=(7, 4), dpi=_DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    _named(axes, title, x, y)
    return figure, axes


def _named(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.spines[["top", "right"]].set_visible(False)


def _percent(axes: Axes, bars: BarContainer) -> None:
    axes.bar_label(bars, fmt=lambda share: f"{share:.0%}", padding=2)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.12)
