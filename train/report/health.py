"""Whether the run is healthy and fast: gradient and hidden norms, router signs, throughput, memory."""

from __future__ import annotations

import numpy as np

from train.report.chart import Chart, Guide, Series
from train.report.numbers import compact, exact, flops, percent, plain
from train.report.reading import RunData

NAMED_LAYERS = 14  # names at the right edge
PART_BUCKETS = 150  # points of a curve
ROUTER_RATIO_LIMIT = 0.1  # report, router stability: the balance loss's share of the router's gradient


def stability(run: RunData) -> list[Chart | None]:
    """Return the charts of numerical health; None where there is no data."""
    return [gradient_chart(run), parts_chart(run), hidden_chart(run), ratio_chart(run), similarity_chart(run)]


def speed(run: RunData) -> list[Chart | None]:
    """Return the charts of speed and memory; None where there is no data."""
    return [throughput_chart(run), mfu_chart(run), exposed_chart(run), memory_chart(run)]


def gradient_chart(run: RunData) -> Chart | None:
    """Norm of the gradient before clipping, with the clipping limit if one is set."""
    x, y = run.series("grad_norm")
    if not len(y):
        return None
    final, peak = run.final("grad_norm"), int(y.argmax())
    sentence = f"{plain(final)} at the end, {plain(float(np.median(y)))} in the middle; the largest is "
    sentence += f"{plain(float(y[peak]))} at {compact(float(x[peak]))} {run.axis_name}"
    clip = run.number("optim.grad_clip")
    guides = []
    if clip:
        sentence += f". Clipped at {exact(clip)} on {percent(float((y > clip).mean()))} of the steps"
        guides = [Guide(clip, f"clip {exact(clip)}")] if y.min() / 3 < clip < y.max() * 3 else []
    series = [Series("gradient norm", *run.points("grad_norm"), colour=0)]
    return Chart("Gradient norm", sentence + ".", series, plain(final), guides, log=True)


def parts_chart(run: RunData) -> Chart | None:
    """Norm of the gradient of each layer, of embedding, head and MTP."""
    prefix = "grad_norm/layer_"
    layers = sorted(int(key.removeprefix(prefix)) for key in run.columns if _is_layer(key, prefix))
    layers = [layer for layer in layers if len(run.points(f"{prefix}{layer}")[0]) > 1]
    if not layers:
        return None
    named = {layers[at] for at in np.linspace(0, len(layers) - 1, min(NAMED_LAYERS, len(layers))).astype(int)}
    series = []
    for number, layer in enumerate(layers):
        final = run.final(f"{prefix}{layer}")
        mix = number / max(1, len(layers) - 1)
        points = run.points(f"{prefix}{layer}")
        end, is_named = f"L{layer} {plain(final, 2)}", layer in named
        series.append(Series(f"layer {layer}", *points, end=end, value=final, named=is_named, mix=mix))
    for part, name, colour in (("embedding", "embed", 4), ("head", "head", 2), ("mtp", "MTP", 3)):
        points = run.points(f"grad_norm/{part}")
        if len(points[0]) > 1:
            final = run.final(f"grad_norm/{part}")
            series.append(Series(name, *points, colour, dashes=1, end=f"{name} {plain(final, 2)}", value=final))
    finals = [(run.final(f"{prefix}{layer}"), layer) for layer in layers]
    largest, smallest = max(finals), min(finals)
    sentence = (
        f"At the end layer {largest[1]} has the largest norm of the layers ({plain(largest[0])}), layer "
        f"{smallest[1]} the smallest ({plain(smallest[0])}). A layer that leaves the others is unstable or learns "
        "nothing."
    )
    title = "Gradient norm by layer"
    return Chart(title, sentence, series, log=True, wide=True, envelopes=False, buckets=PART_BUCKETS)


def _is_layer(key: str, prefix: str) -> bool:
    return key.startswith(prefix) and key.removeprefix(prefix).isdecimal()


def hidden_chart(run: RunData) -> Chart | None:
    """Norm of the hidden state before the final norm."""
    y = run.series("hidden_norm")[1]
    if not len(y):
        return None
    final = run.final("hidden_norm")
    sentence = (
        f"The hidden state before the final norm goes from {plain(float(y[0]))} to {plain(final)}; "
        "growth by orders of magnitude precedes loss spikes."
    )
    return Chart(
        "Hidden norm",
        sentence,
        [Series("norm", *run.points("hidden_norm"), 4)],
        plain(final),
        log=True,
    )


def ratio_chart(run: RunData) -> Chart | None:
    """Balance-loss gradient over language-model gradient at the router, with its limit of 0.1."""
    y = run.series("router_grad_ratio")[1]
    if not len(y):
        return None
    final, above = run.final("router_grad_ratio"), float((y > ROUTER_RATIO_LIMIT).mean())
    sentence = (
        f"The balance loss's gradient at the router is {plain(final)} of the language model's at the end "
        f"and was above the limit of {ROUTER_RATIO_LIMIT} on {percent(above)} of the steps."
    )
    guides = [Guide(ROUTER_RATIO_LIMIT, f"limit {ROUTER_RATIO_LIMIT}")]
    series = [Series("ratio", *run.points("router_grad_ratio"), 1)]
    chart = Chart("Router gradient ratio", sentence, series, plain(final), guides, log=True)
    return chart


def similarity_chart(run: RunData) -> Chart | None:
    """Mean pairwise cosine between the rows of the router."""
    y = run.series("router_similarity")[1]
    if not len(y):
        return None
    final = run.final("router_similarity")
    sentence = (
        f"Mean cosine between the router's rows: {plain(final)} at the end, at most {plain(float(y.max()))}; "
        "a rise towards 1 would mean that the balance loss dominates the router."
    )
    series = [Series("cosine", *run.points("router_similarity"), 3)]
    return Chart("Router similarity", sentence, series, plain(final))


def throughput_chart(run: RunData) -> Chart | None:
    """Tokens per second over all ranks."""
    y = run.series("tokens_per_second")[1]
    if not len(y):
        return None
    middle = float(np.median(y))
    slow = float((y < 0.8 * middle).mean())
    sentence = (
        f"{compact(middle)} tokens per second (median); {percent(slow)} of the steps were slower "
        "than 80 % of that (a lasting dip means a slow rank or disk, or another process)."
    )
    series = [Series("tokens/s", *run.points("tokens_per_second"), 2)]
    value = f"{compact(middle)}/s"
    return Chart("Throughput", sentence, series, value, from_zero=True)


def mfu_chart(run: RunData) -> Chart | None:
    """Model FLOPs utilisation in percent of the peak given in the configuration."""
    y = run.series("mfu")[1]
    if not len(y):
        return None
    middle, peak = float(np.median(y)), run.number("derived.peak_gflops_per_rank")
    against = f" of {flops(peak * 1e9)} per rank" if peak else " of the peak"
    best = percent(float(y.max()))
    sentence = f"Model FLOPs utilisation is {percent(middle)}{against} (median), {best} at best."
    series = [Series("MFU %", run.points("mfu")[0], 100 * run.points("mfu")[1], 2)]
    return Chart("MFU", sentence, series, percent(middle), from_zero=True, unit="%")


def exposed_chart(run: RunData) -> Chart | None:
    """Share of a step in which ranks wait for exposed communication."""
    y = run.series("exposed_comm_share")[1]
    if not len(y) or not (y > 0).any():
        return None
    middle = float(np.median(y))
    sentence = f"{percent(middle)} of a step (median) is exposed: no computation overlaps it; lower is better."
    title = "Exposed communication"
    series = [Series("exposed %", run.points("exposed_comm_share")[0], 100 * run.points("exposed_comm_share")[1], 1)]
    return Chart(title, sentence, series, percent(middle), from_zero=True, unit="%")


def memory_chart(run: RunData) -> Chart | None:
    """Peak memory per rank."""
    y = run.series("memory_gib")[1]
    if not len(y):
        return None
    top = float(y.max())
    earlier = float(y[len(y) // 2])
    sentence = f"At most {plain(top)} GiB; {plain(float(y[-1]))} GiB at the end against {plain(earlier)} halfway, "
    sentence += "and a steady climb would be a leak."
    series = [Series("GiB", *run.points("memory_gib"), 4)]
    return Chart("Memory", sentence, series, f"{plain(top)} GiB", from_zero=True)
