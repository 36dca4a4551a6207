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
def trade_off(curves, path, title="Guidance makes digits surer, and less varied", note=""):
    """Save how accuracy, quality, diversity and Fréchet distance depend on the guidance scale.

    curves: {"where guidance acts": {scale: {"read as asked", "precision", "recall", "Fréchet
    distance": number}}}, two of them; scales below 1 are left out.
    """
    fig = _figure(9.5, 4.4, title, note)
    left, right = fig.subplots(1, 2)
    for (where, scores), style in zip(curves.items(), ("-", "--")):
        scales = sorted(scale for scale in scores if scale >= 1)

        def plot(ax, name, colour, mark, scales=scales, scores=scores, style=style, where=where):
            values = [scores[scale][name] for scale in scales]
            label = f"{name}, {where}" if ax is left else where
            ax.plot(scales, values, mark + style, color=colour, label=label)

        plot(left, "read as asked", ORANGE, "o")
        plot(left, "precision", "#009E73", "s")
        plot(left, "recall", BLUE, "^")
        plot(right, "Fréchet distance", "black", "o")
        for ax in left, right:
            ax.set_xticks(scales, [f"{scale:g}" for scale in scales], fontsize=8)
            ax.set_xlabel("guidance scale")
    left.set(title="Accuracy, quality (precision), diversity (recall)", ylim=(None, 1.01))
    right.set(title="Fréchet distance (lower is better)")
    right.set_ylim(bottom=0)
    for ax in left, right:
        ax.legend(fontsize=8)
    return _save(fig, path)


@matplotlib.rc_context(STYLE)
def quality_by_steps(curves, levels, draws, path, title="Few steps are enough", note=""):
    """Save how the Fréchet distance of samplers falls with the network evaluations per image.

    curves: {"sampler": {evaluations: distance}}, up to three. levels: {"name": distance}, drawn
    across. draws: evaluations, and the distances of several draws with them.
    """
    fig = _figure(9.5, 5, title, note)
    ax = fig.subplots()
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, "#009E73")):
        ax.plot(list(curve), list(curve.values()), "o-", color=colour, label=name)
    evaluations, distances = draws
    ax.plot([evaluations] * len(distances), distances, "_", color="black", label="other draws")
    for (name, distance), style in zip(levels.items(), ("--", ":")):
        ax.axhline(distance, color=GREY, linestyle=style, label=name)
    ticks = sorted({evaluations for curve in curves.values() for evaluations in curve})
    ax.set(xscale="log", yscale="log", xlabel="network evaluations", ylabel="Fréchet distance")
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    low, high = ax.get_ylim()
    heights = [height for height in (1, 2, 5, 10, 20, 50, 100, 200) if low < height < high]
    ax.set_yticks(heights, heights)
    ax.legend(loc=(0.02, 0.1))
    return _save(fig, path)
