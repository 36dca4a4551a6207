"""The figures of benchmark.py and ladder.py, in the style of utils/visualize.py."""

import matplotlib

from utils.visualize import BLUE, GREY, ORANGE, STYLE, _figure, _save


@matplotlib.rc_context(STYLE)
def bars(values, path, title="", xlabel="", note="", other_from=None):
    """Save the means of {name: numbers} as bars with a dot for each number; from bar number
    other_from on in grey."""
    fig = _figure(8, 1.2 + 0.32 * len(values), title, note)
    ax, names = fig.subplots(), list(values)
    colours = [BLUE if i < (other_from or len(values)) else GREY for i in range(len(values))]
    means = [sum(numbers) / len(numbers) for numbers in values.values()]
    ax.barh(names, means, color=colours)
    for name, mean, numbers in zip(names, means, values.values()):
        ax.plot(numbers, [name] * len(numbers), ".", color="black")
        offset = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(f"{mean:.1f}", (max(mean, *numbers), name), **offset)
    ax.invert_yaxis()
    ax.set(xlabel=xlabel, xlim=(0, 1.2 * max(max(numbers) for numbers in values.values())))
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def trade_off(scores, path, title="What guidance gives and what it takes", note=""):
    """Save how accuracy, diversity and the Fréchet distance depend on the guidance scale.

    scores: {scale: {"read as asked", "recall", "spread", "Fréchet distance": number}}.
    """
    fig = _figure(9.5, 4.2, title, note)
    left, right = fig.subplots(1, 2)
    labels = {
        "read as asked": "read as the digit that was asked for",
        "spread": "spread within a digit (real images: 1)",
        "recall": "recall: share of real images in reach",
    }
    for (name, label), colour, mark in zip(labels.items(), (ORANGE, BLUE, GREY), "os^"):
        values = [score[name] for score in scores.values()]
        left.plot(list(scores), values, mark + "-", color=colour, label=label)
    left.set(title="Accuracy and diversity", xlabel="guidance scale", ylim=(0, 2))
    left.legend(loc="upper right", fontsize=8)
    distances = [score["Fréchet distance"] for score in scores.values()]
    right.plot(list(scores), distances, "o-", color=BLUE)
    right.set(title="Fréchet distance (lower is better)", xlabel="guidance scale")
    right.set_ylim(bottom=0)
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def quality_by_steps(curves, reference, path, title="Quality against cost", note=""):
    """Save how the Fréchet distance of samplers falls with the network evaluations per image.

    curves: {"sampler, spacing": {evaluations: distance}}; a sampler has one colour, a spacing one
    style. reference: (name, distance), drawn across.
    """
    fig = _figure(9.5, 5, title, note)
    ax = fig.subplots()
    colours, styles = {}, {}
    for name, curve in curves.items():
        sampler, _, spacing = name.rpartition(", ")
        colour = colours.setdefault(sampler, (BLUE, ORANGE, "#009E73")[len(colours) % 3])
        style = styles.setdefault(spacing, ("o-", "s--", "^:")[len(styles) % 3])
        ax.plot(list(curve), list(curve.values()), style, color=colour, label=name)
    ax.axhline(reference[1], color=GREY, linestyle="--", label=reference[0])
    ticks = sorted({evaluations for curve in curves.values() for evaluations in curve})
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    low, high = ax.get_ylim()
    heights = [height for height in (1, 2, 5, 10, 20, 50, 100, 200) if low < height < high]
    ax.set_yticks(heights, heights)
    ax.legend()
    return _save(fig, path)
