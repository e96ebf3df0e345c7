"""The verbs that make a checkpoint of others; the docstring of each is its help."""

from __future__ import annotations

from shlex import quote

from longcat.errors import OK


def grow(arguments: list[str]) -> int:
    """grow source=DIR target=DIR   grow a checkpoint in depth, with moments and counters

    longcat grow source=runs/half target=runs/half-grown
    longcat grow source=runs/half/checkpoints/step-00000400 target=grown growth.factor=3 growth.method=interpose

    source is a checkpoint, or a run folder, for its newest valid checkpoint. growth.method=stack repeats the whole
    stack of layers (0 1 0 1), growth.method=interpose each layer in place (0 0 1 1), growth.factor times (2). The
    memory it takes does not depend on the model's size. Train the grown model with the old run's settings,
    model.num_layers times the factor, checkpoint.resume=TARGET and another run.name.
    """
    from launch.options import read_options
    from train.checkpoint.grow import GrowConfig
    from train.checkpoint.grow import grow as grow_checkpoint

    config = read_options(GrowConfig, arguments)
    source, growth = grow_checkpoint(config)
    layers = growth.num_layers * growth.factor
    print(f"{source}: {growth.num_layers} layers → {config.target}: {layers} layers as {growth.sources}")
    print(f"train it with model.num_layers={layers} {quote(f'checkpoint.resume={config.target}')} and another run.name")
    return 0


def merge(arguments: list[str]) -> int:
    """merge source=RUN target=DIR  average checkpoints of a run, as a stand-in for a decay of the rate

    longcat merge source=runs/constant target=merged last=4
    longcat merge source=runs/a/checkpoints/step-00000800,runs/a/checkpoints/step-00001000 target=merged weights=1,2

    source lists checkpoints; a run folder stands for all of its checkpoints, of which last=N takes the newest. Weights
    and biases are averaged, one tensor at a time, in any layout; moments start at zero, counters are the newest
    checkpoint's. The result can be exported, and trained with the run's settings, checkpoint.resume=TARGET and another
    run.name.
    """
    from launch.options import read_options
    from train.checkpoint.merge import MergeConfig
    from train.checkpoint.merge import merge as merge_checkpoints

    config = read_options(MergeConfig, arguments)
    sources = merge_checkpoints(config)
    total = sum(source.weight for source in sources)
    for source in sources:
        print(f"{source.weight / total:.4f} of {source.checkpoint.folder}")
    print(f"{config.target}: the average of {len(sources)} checkpoints; counters are those of step {sources[-1].step}")
    print(f"train it with {quote(f'checkpoint.resume={config.target}')} and another run.name")
    return OK
