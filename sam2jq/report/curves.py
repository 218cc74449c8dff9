"""curves.png of a distillation: losses, mean bits, and the bits of each layer over the steps."""

import numpy as np
from matplotlib.figure import Figure

WIDTHS = (2, 8)  # bits: the range of the colour scale


def plot_history(history: dict) -> Figure:
    """A figure with losses and mean bits per weight over steps, above a heat map of the bits of every layer.

    history: as `distillation.history` returns it.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 1.6))
    for name, label in {"loss": "training", "val_loss": "validation"}.items():
        if history[name]:
            top.plot(*zip(*history[name]), label=label, marker="o" if name == "val_loss" else None, markersize=4)
    top.set(xlabel="step", ylabel="loss", yscale="log")
    top.legend(loc="upper right")
    mean = top.twinx()
    if history["avg_bit_width"]:
        mean.step(*zip(*history["avg_bit_width"]), where="post", color="0.5", linestyle="--")
    mean.set_ylabel("bits per weight (dashed)")
    layers = history["bits"]["layers"]
    if layers:
        rows = np.array(list(layers.values()))
        image = bottom.imshow(
            rows, aspect="auto", interpolation="nearest", cmap="cividis", vmin=WIDTHS[0], vmax=WIDTHS[1]
        )
        bottom.set(xlabel="after step", ylabel="layer, in the order of the data")
        bottom.set_xticks(range(len(history["bits"]["steps"])), history["bits"]["steps"])
        figure.colorbar(image, ax=bottom, label="bits")
    else:
        bottom.set_axis_off()
    return figure
