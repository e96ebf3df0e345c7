"""Whether the run is healthy and fast: gradient and hidden norms, router signs, throughput, memory."""

from __future__ import annotations

import numpy as np

from train.report.chart import Chart, Guide, Series, render
from train.report.numbers import compact, exact, flops, percent, plain
from train.report.reading import RunData

ROUTER_RATIO_LIMIT = 0.1  # report, router stability: the balance loss's share of the router's gradient


def stability(run: RunData) -> list[str]:
    """Return the charts of numerical health; those without data are empty strings."""
    return [gradient_chart(run), hidden_chart(run), ratio_chart(run), similarity_chart(run)]


def speed(run: RunData) -> list[str]:
    """Return the charts of speed and memory; those without data are empty strings."""
    return [throughput_chart(run), mfu_chart(run), exposed_chart(run), memory_chart(run)]


def gradient_chart(run: RunData) -> str:
    """Norm of the gradient before clipping, with the clipping limit if one is set."""
    x, y = run.series("grad_norm")
    if not len(y):
        return ""
    final, peak = run.final("grad_norm"), int(y.argmax())
    sentence = f"{plain(final)} at the end, {plain(float(np.median(y)))} in the middle; the largest is "
    sentence += f"{plain(float(y[peak]))} at {compact(float(x[peak]))} {run.axis_name}"
    clip = run.number("optim.grad_clip")
    guides = []
    if clip:
        sentence += f". Clipped at {exact(clip)} on {percent(float((y > clip).mean()))} of the steps"
        guides = [Guide(clip, f"clip {exact(clip)}")] if y.min() / 3 < clip < y.max() * 3 else []
    series = [Series("gradient norm", x, y, colour=0)]
    return render(
        Chart("Gradient norm", sentence + ".", series, plain(final), guides, log=True, axis_name=run.axis_name)
    )


def hidden_chart(run: RunData) -> str:
    """Norm of the hidden state before the final norm."""
    x, y = run.series("hidden_norm")
    if not len(y):
        return ""
    final = run.final("hidden_norm")
    sentence = (
        f"The hidden state before the final norm goes from {plain(float(y[0]))} to {plain(final)}; "
        "growth by orders of magnitude precedes loss spikes."
    )
    return render(
        Chart(
            "Hidden norm",
            sentence,
            [Series("norm", x, y, 4)],
            plain(final),
            log=True,
            axis_name=run.axis_name,
        )
    )


def ratio_chart(run: RunData) -> str:
    """Balance-loss gradient over language-model gradient at the router, with its limit of 0.1."""
    x, y = run.series("router_grad_ratio")
    if not len(y):
        return ""
    final, above = run.final("router_grad_ratio"), float((y > ROUTER_RATIO_LIMIT).mean())
    sentence = (
        f"The balance loss's gradient at the router is {plain(final)} of the language model's at the end "
        f"and was above the limit of {ROUTER_RATIO_LIMIT} on {percent(above)} of the steps."
    )
    guides = [Guide(ROUTER_RATIO_LIMIT, f"limit {ROUTER_RATIO_LIMIT}")]
    series = [Series("ratio", x, y, 1)]
    chart = Chart("Router gradient ratio", sentence, series, plain(final), guides, log=True, axis_name=run.axis_name)
    return render(chart)


def similarity_chart(run: RunData) -> str:
    """Mean pairwise cosine between the rows of the router."""
    x, y = run.series("router_similarity")
    if not len(y):
        return ""
    final = run.final("router_similarity")
    sentence = (
        f"Mean cosine between the router's rows: {plain(final)} at the end, at most {plain(float(y.max()))}; "
        "a rise towards 1 would mean that the balance loss dominates the router."
    )
    series = [Series("cosine", x, y, 3)]
    return render(Chart("Router similarity", sentence, series, plain(final), axis_name=run.axis_name))


def throughput_chart(run: RunData) -> str:
    """Tokens per second over all ranks."""
    x, y = run.series("tokens_per_second")
    if not len(y):
        return ""
    middle = float(np.median(y))
    slow = float((y < 0.8 * middle).mean())
    sentence = (
        f"{compact(middle)} tokens per second (median); {percent(slow)} of the steps were slower "
        "than 80 % of that (a lasting dip means a slow rank or disk, or another process)."
    )
    series = [Series("tokens/s", x, y, 2)]
    value = f"{compact(middle)}/s"
    return render(Chart("Throughput", sentence, series, value, from_zero=True, axis_name=run.axis_name))


def mfu_chart(run: RunData) -> str:
    """Model FLOPs utilisation in percent of the peak given in the configuration."""
    x, y = run.series("mfu")
    if not len(y):
        return ""
    middle, peak = float(np.median(y)), run.number("derived.peak_gflops_per_rank")
    against = f" of {flops(peak * 1e9)} per rank" if peak else " of the peak"
    best = percent(float(y.max()))
    sentence = f"Model FLOPs utilisation is {percent(middle)}{against} (median), {best} at best."
    series = [Series("MFU %", x, 100 * y, 2)]
    return render(Chart("MFU", sentence, series, percent(middle), from_zero=True, axis_name=run.axis_name, unit="%"))


def exposed_chart(run: RunData) -> str:
    """Share of a step in which ranks wait for exposed communication."""
    x, y = run.series("exposed_comm_share")
    if not len(y) or not (y > 0).any():
        return ""
    middle = float(np.median(y))
    sentence = f"{percent(middle)} of a step (median) is exposed: no computation overlaps it; lower is better."
    title = "Exposed communication"
    series = [Series("exposed %", x, 100 * y, 1)]
    return render(Chart(title, sentence, series, percent(middle), from_zero=True, axis_name=run.axis_name, unit="%"))


def memory_chart(run: RunData) -> str:
    """Peak memory per rank."""
    x, y = run.series("memory_gib")
    if not len(y):
        return ""
    top = float(y.max())
    earlier = float(y[len(y) // 2])
    sentence = f"At most {plain(top)} GiB; {plain(float(y[-1]))} GiB at the end against {plain(earlier)} halfway, "
    sentence += "and a steady climb would be a leak."
    series = [Series("GiB", x, y, 4)]
    return render(Chart("Memory", sentence, series, f"{plain(top)} GiB", from_zero=True, axis_name=run.axis_name))
