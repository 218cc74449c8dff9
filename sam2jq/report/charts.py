"""Charts as SVG text that uses the font and the text colour of the page around it."""

import io
from itertools import groupby

import numpy as np

INK = "#010203"  # replaced by the text colour of the page, dark or light
BLUE, ORANGE, GREEN = "#0072b2", "#e69f00", "#009e73"  # of Okabe and Ito, for colour-blind readers
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sam2jq",  # so that the same run gives the same page, byte for byte
    "font.size": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#888888",
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def render_svg(draw, size: tuple[float, float], rows: int = 1, columns: int = 1, **options) -> str:
    """The SVG text of a figure of `size` inches that draw(axes [rows, columns]) has drawn."""
    import matplotlib as mpl  # here, since its import takes half a second, which a command's errors should not wait for
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        draw(figure.subplots(rows, columns, squeeze=False, **options))
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)


def layer_chart(layers: list[dict]) -> str:
    """A chart of the error and the bits of each layer in the order of the data, with the names of SAM 2's parts below.

    The error is that of outputs if it is known for all layers, else that of weights.
    """
    outputs = all(row["output_error"] is not None for row in layers)
    errors = [row["output_error" if outputs else "relative_error"] for row in layers]
    at = np.arange(len(layers))

    def draw(axes) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        (top,), (low,) = axes
        top.vlines(at, min(filter(None, errors), default=1e-3) / 2, errors, color=BLUE, linewidth=2.5)
        top.set(yscale="log", ylabel="error of outputs" if outputs else "error of weights")
        top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        top.yaxis.set_major_formatter("{x:g}")
        top.yaxis.set_minor_locator(NullLocator())
        low.bar(at, [row["bits"] for row in layers], width=0.8, color=ORANGE)
        low.set(ylabel="bits", xticks=[], yticks=sorted({row["bits"] for row in layers}), xlim=(-1, len(layers)))
        start = 0
        for i, (name, rows) in enumerate(groupby(layers, lambda row: row["part"])):
            end = start + len(list(rows))
            for ax in (top, low):
                ax.axvline(end - 0.5, color="#888888", linewidth=0.6)
            # names alternate between two lines, since those of short parts would overlap
            low.text((start + end - 1) / 2, -0.12 - 0.2 * (i % 2), name, ha="center", va="top",
                     transform=low.get_xaxis_transform())  # fmt: skip
            start = end

    return render_svg(draw, (8, 3.4), rows=2, sharex=True, height_ratios=[2.2, 1])


def stage_chart(rows: list[dict]) -> str:
    """A chart of the relative error of each feature level after each stage in `rows`."""
    names = [row["name"] for row in rows]

    def draw(axes) -> None:
        [[ax]] = axes
        for (level, color), marker in zip(zip(rows[0]["feature_error"], (BLUE, ORANGE, GREEN)), "osD"):
            errors = [row["feature_error"][level] for row in rows]
            ax.plot(names, errors, color=color, marker=marker, label=level.replace("stride", "stride "))
        ax.set(ylabel="relative error of features", ylim=(0, None))
        ax.margins(x=0.1)
        ax.legend()

    return render_svg(draw, (6, 2.6))


def pareto_chart(points: list[dict], names: list[str]) -> str:
    """A chart of size in MB against each of the scores `names`, with the points on the Pareto front joined.

    points: dicts with "letter", "mb", "scores": {name: percent}, "front": names of scores in which the point is on the
    front, and "full": {name: percent in full precision}.
    """
    columns = min(2, len(names))

    def draw(axes) -> None:
        for ax, name in zip(axes.flat, names):
            shown = sorted((p for p in points if name in p["scores"]), key=lambda p: p["mb"])
            front = [p for p in shown if name in p["front"]]
            ax.step([p["mb"] for p in front], [p["scores"][name] for p in front], where="post", color=BLUE, zorder=1)
            near = 0.05 * (shown[-1]["mb"] - shown[0]["mb"])
            for p in shown:
                on = name in p["front"]
                ax.plot(p["mb"], p["scores"][name], "o" if on else "X", color=BLUE if on else ORANGE, markersize=7)
                beside = [q["scores"][name] for q in shown if abs(q["mb"] - p["mb"]) <= near]
                offset = (
                    (5, 5) if p["scores"][name] >= max(beside) else (5, -11)
                )  # so that the letters of two close points do not overlap
                ax.annotate(p["letter"], (p["mb"], p["scores"][name]), xytext=offset, textcoords="offset points")
            ax.axhline(shown[0]["full"][name], color="#888888", linestyle="--", linewidth=1)
            ax.set(title=name, xlabel="MB", ylabel="percent")
            ax.margins(0.12)
        for ax in axes.flat[len(names) :]:
            ax.set_axis_off()

    rows = -(-len(names) // columns)
    return render_svg(draw, (4 * columns, 2.8 * rows), rows=rows, columns=columns)


def loss_chart(training: list[list[float]], validation: list[list[float]]) -> str:
    """A chart of the losses [[step, loss], ...] over the steps of training."""

    def draw(axes) -> None:
        ax = axes[0, 0]
        ax.plot(*zip(*training), color=BLUE, label="training")
        if validation:
            ax.plot(*zip(*validation), "o-", color=ORANGE, label="validation")
        ax.set(xlabel="step", ylabel="loss", yscale="log")
        ax.legend()

    return render_svg(draw, (6, 2.6))


def bits_chart(steps: list[int], layers: dict[str, list[float]]) -> str:
    """A heat map of the bits of each layer, one row each, at each of `steps`."""

    def draw(axes) -> None:
        ax = axes[0, 0]
        image = ax.imshow(np.array(list(layers.values())), aspect="auto", cmap="viridis", interpolation="nearest")
        at = np.unique(np.linspace(0, len(steps) - 1, min(8, len(steps))).astype(int))
        ax.set(xlabel="step", ylabel="layer", xticks=at, xticklabels=[steps[i] for i in at])
        ax.grid(visible=False)
        ax.figure.colorbar(image, ax=ax, label="bits")

    return render_svg(draw, (8, 3.4))
