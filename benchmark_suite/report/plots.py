"""What the report draws, after the figures of the Tied-LoRA papers."""

from dataclasses import dataclass
from statistics import fmean

from benchmark_suite.report.drawing import INK, Plot, draw, series
from benchmark_suite.report.numbers import times
from benchmark_suite.report.pareto import front
from benchmark_suite.report.section import Section
from benchmark_suite.report.table import Table

#: More of them than of colours, so that a second round of colours does not repeat a pair.
MARKERS = "osD^vP*Xp<>hd"
COSTS = {"peak_memory_bytes": "Peak memory", "tokens_per_second": "Tokens per second"}


@dataclass(frozen=True)
class Gallery:
    """Plots of one kind, side by side."""

    title: str
    note: str
    plots: list[Plot]


def galleries(section: Section, cost: Table | None) -> list[Gallery]:
    """All plots of one base; ``cost`` is its table of ratios."""
    found = [
        Gallery(
            "Score against size",
            "Every evaluated rank, by trainable parameters. The dashed line is the Pareto front: no other variant or "
            "rank is both as small and as good as one on it.",
            [_size(section, task) for task in section.tasks],
        ),
        Gallery(
            "Score against rank",
            "Mean over seeds; the bars are one standard deviation. A line without points is a variant without a rank.",
            [_rank(section, task) for task in section.tasks] + _average(section),
        ),
        Gallery(
            "Memory and speed",
            f"Relative to {section.against} at the same task and rank; the cost table has the numbers.",
            [bars for key, title in COSTS.items() if cost and (bars := _bars(section, cost, key, title))],
        ),
    ]
    return [gallery for gallery in found if gallery.plots]


def _size(section: Section, task: str) -> Plot:
    from matplotlib.ticker import EngFormatter

    settings = [at for at in section.settings if at.task == task]
    edge = front(settings)

    def paint(axes) -> None:
        places = [at.mean("trainable") for at in edge], [at.score.mean for at in edge]
        axes.plot(*places, "--", color=INK, lw=1, alpha=0.6)
        for variant in section.variants:
            points = section.ranks(task, variant)
            places = [at.mean("trainable") for at in points], [at.score.mean for at in points]
            axes.plot(*places, linestyle="", **_style(section, variant))
        axes.set(xscale="log", xlabel="trainable parameters", ylabel=settings[0].primary)
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))  # powers of ten would need mathtext
        axes.minorticks_off()

    return draw(task, f"{task}: {settings[0].primary} against trainable parameters", paint)


def _rank(section: Section, task: str) -> Plot:
    primary = next(at.primary for at in section.settings if at.task == task)

    def paint(axes) -> None:
        for variant in section.variants:
            points = section.ranks(task, variant)
            means, spread = [at.score.mean for at in points], [at.score.std or 0 for at in points]
            ranks = [at.rank for at in points]
            if None in ranks:
                _level(axes, section, variant, means[0])
            else:
                axes.errorbar(ranks, means, spread, lw=1.4, elinewidth=0.8, **_style(section, variant))
        axes.set(ylabel=primary)
        _rank_axis(axes, section)

    return draw(task, f"{task}: {primary} against rank", paint)


def _average(section: Section) -> list[Plot]:
    """The mean over tasks, for the ranks at which a variant has all of them."""
    if len(section.tasks) < 2 or not all(at.higher_is_better for at in section.settings):
        return []

    def paint(axes) -> None:
        for variant in section.variants:
            scores: dict[int | None, list[float]] = {}
            for at in section.settings:
                if at.variant == variant:
                    scores.setdefault(at.rank, []).append(at.score.mean)
            means = {rank: fmean(of) for rank, of in scores.items() if len(of) == len(section.tasks)}
            if None in means:
                _level(axes, section, variant, means[None])
            else:
                ranks = sorted(rank for rank in means if rank is not None)
                axes.plot(ranks, [means[rank] for rank in ranks], lw=1.4, **_style(section, variant))
        axes.set(ylabel="mean score")
        _rank_axis(axes, section)

    return [draw("average over tasks", "Mean score over tasks against rank", paint)]


def _bars(section: Section, cost: Table, key: str, title: str) -> Plot | None:
    ratios = {row["variant"]: row[key] for row in reversed(cost.rows) if row[key] is not None}
    if not ratios:
        return None

    def paint(axes) -> None:
        colours = [series(section.variants.index(variant)) for variant in ratios]
        bars = axes.barh(range(len(ratios)), list(ratios.values()), color=colours, height=0.7)
        axes.bar_label(bars, [times(ratio) for ratio in ratios.values()], padding=4, color=INK)
        axes.set_yticks(range(len(ratios)), list(ratios))
        axes.axvline(1, color=INK, lw=0.8, ls=":")
        axes.margins(x=0.18)
        axes.grid(axis="y", visible=False)

    spoken = ", ".join(f"{variant} {times(ratio)}" for variant, ratio in ratios.items())
    return draw(f"{title} beside {section.against}", f"{title}: {spoken}", paint, height=0.8 + 0.28 * len(ratios))


def _rank_axis(axes, section: Section) -> None:
    ranks = sorted({at.rank for at in section.settings if at.rank is not None})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set(xlabel="rank r")


def _level(axes, section: Section, variant: str, score: float) -> None:
    axes.axhline(score, lw=1.4, ls="-.", color=series(section.variants.index(variant)))


def _style(section: Section, variant: str) -> dict[str, object]:
    place = section.variants.index(variant)
    return {"color": series(place), "marker": MARKERS[place % len(MARKERS)], "ms": 5.5, "mec": "none"}
