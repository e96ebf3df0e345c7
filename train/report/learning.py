"""What the model learned: losses against the n-gram baselines, learning rates, auxiliary losses."""

from __future__ import annotations

import numpy as np

from train.health.corpora import PREFIX
from train.report.chart import DOTS_ALONE, Chart, Guide, Series
from train.report.curves import first_below
from train.report.numbers import compact, exact, plain
from train.report.reading import RunData, is_number

NGRAMS = ("unigram", "bigram", "trigram")


def charts(run: RunData) -> list[Chart | None]:
    """Return the charts of this subject; None where there is no data."""
    return [loss_chart(run), corpora_chart(run), rate_chart(run), auxiliary_chart(run)]


def loss_chart(run: RunData) -> Chart | None:
    """Train, MTP and validation loss in nats, with the n-gram models as horizontal lines."""
    series = [
        Series("train", *run.points("loss"), colour=0, end=f"train {run.final('loss'):.2f}", value=run.final("loss")),
        Series(
            "MTP",
            *run.points("loss_mtp"),
            colour=3,
            end=f"MTP {run.final('loss_mtp'):.2f}",
            value=run.final("loss_mtp"),
        ),
        Series(
            "validation",
            *run.points("val_loss"),
            colour=1,
            points=True,
            end=f"val {run.last('val_loss'):.2f}",
            value=run.last("val_loss"),
        ),
    ]
    dots = spike_points(run)
    if dots is not None:
        series.append(dots)
    guides = [
        Guide(run.baselines[name], f"{name} {run.baselines[name]:.2f}") for name in NGRAMS if name in run.baselines
    ]
    final = run.final("loss")
    return Chart(
        "Loss",
        loss_sentence(run) + ("" if dots is None else " Red dots are steps that spiked."),
        [one for one in series if len(one.steps)],
        f"{plain(final)} nats",
        guides,
        log=True,
        wide=True,
    )


def corpora_chart(run: RunData) -> Chart | None:
    """Validation loss of each corpus, where a run has several."""
    names = sorted(key for key in run.columns if key.startswith(PREFIX) and len(run.points(key)[0]))
    if not names:
        return None
    series = [
        Series(key.removeprefix(PREFIX), *run.points(key), number % 8, points=True, value=run.last(key))
        for number, key in enumerate(names)
    ]
    values = [f"{key.removeprefix(PREFIX)} {run.last(key):.2f}" for key in names]
    text = f"Nats per token of held-out text, by corpus; at the end {', '.join(values)}."
    return Chart("Validation loss by corpus", text, series, f"{len(names)} corpora")


def spike_points(run: RunData) -> Series | None:
    """The losses of the steps that spiked, also of those that a rollback undid."""
    found = [event for event in run.events or [] if event["event"] == "spike" and is_number(event.get("loss"))]
    if not found:
        return None
    pairs = sorted((float(event["step"]), float(event["loss"])) for event in found)
    steps, losses = (np.array(values) for values in zip(*pairs, strict=True))
    return Series("spike", steps, losses, colour=5, points=True, dashes=DOTS_ALONE, named=False)


def loss_sentence(run: RunData) -> str:
    """State how far the loss fell and which n-gram models it passed, where."""
    y = run.series("loss")[1]
    if not len(y):
        return "Validation loss in nats per token."
    text = f"The training loss falls from {y[0]:.2f} to {run.final('loss'):.2f} nats per token"
    val = run.last("val_loss")
    if np.isfinite(val):
        gap = val - run.final("loss")
        where = "level with" if abs(gap) < 0.005 else f"{abs(gap):.2f} {'above' if gap > 0 else 'below'}"
        text += f"; validation ends at {val:.2f}, {where} it"
    passed = crossings(run)
    if passed:
        text += ". Look where the model crosses the dashed n-gram models: " + ", ".join(passed)
    else:
        text += ". Look for a steady fall without jumps"
    return text + "."


def crossings(run: RunData) -> list[str]:
    """Return where the validation loss (else the training loss) passes below each n-gram baseline."""
    x, y = run.series("val_loss")
    if not len(y):
        x, y = run.series("loss")
    unit = " tokens" if run.axis_name == "tokens" else ""
    phrases = []
    for name in NGRAMS:
        if name not in run.baselines or not len(y):
            continue
        where = first_below(x, y, run.baselines[name])
        if where is None:
            phrases.append(f"{name} not passed yet ({float(y.min()) - run.baselines[name]:.2f} above)")
        else:
            at = f"by {compact(where)}{unit}" if run.axis_name == "tokens" else f"by step {compact(where)}"
            phrases.append(f"{name} ({run.baselines[name]:.2f}) {at}")
    return phrases


def rate_chart(run: RunData) -> Chart | None:
    """Every learning rate in the metrics: `lr` and any `lr_…` of a parameter group."""
    keys = [key for key in run.columns if key == "lr" or key.startswith("lr_")]
    series = [Series(key, *run.points(key), number % 8, exact=True) for number, key in enumerate(sorted(keys))]
    series = [one for one in series if len(one.steps)]
    if not series:
        return None
    peak = max(float(one.y.max()) for one in series)
    last = run.last("lr")
    sentence = f"The rate peaks at {exact(peak, 3)}; the last step used {exact(last, 3)}."
    return Chart("Learning rate", sentence, series, exact(last, 3), from_zero=True)


def auxiliary_chart(run: RunData) -> Chart | None:
    """Balance loss and hidden z-loss as they enter the total, on a logarithmic axis."""
    pairs = (("balance", "loss_balance", 2), ("hidden z", "loss_z", 4))
    series = [Series(label, *run.points(key), colour=colour) for label, key, colour in pairs]
    series = [one for one in series if len(one.steps) and (one.y > 0).any()]
    if not series:
        return None
    parts = [f"{one.label} ends at {plain(run.final(key))}" for one, key in _named(series, pairs)]
    main = run.final("loss")
    sentence = " and ".join(parts) + f"; both should stay far below the loss itself ({plain(main)})."
    return Chart("Auxiliary losses", _capital(sentence), series, log=True)


def _named(series: list[Series], pairs: tuple[tuple[str, str, int], ...]) -> list[tuple[Series, str]]:
    keys = {label: key for label, key, _ in pairs}
    return [(one, keys[one.label]) for one in series]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
