"""What a step's prediction is made of: the run, the cluster, and what a rank sends over each link."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from functools import cached_property

from launch.plan.cluster import Cluster
from launch.plan.links import Group, TrafficPattern, group_of, seconds, where
from longcat.counts import count_parameters
from parallel.layout import BatchShape
from parallel.mesh import MeshSizes
from parallel.watchdog.events import SpanKind
from train.config import Config

FORWARD, BACKWARD = SpanKind.FORWARD.value, SpanKind.BACKWARD.value


@dataclass
class AxisTraffic:
    """What a rank sends in a step over one mesh axis, and what it costs."""

    axis: str
    what: str
    group: Group
    num_bytes: float = 0.0
    seconds: float = 0.0
    exposed: float = 0.0  # of them, in which nothing is computed
    work: float = 0.0  # seconds of a processor core that copies them, where ranks share cores


@dataclass
class Step:
    """What the prediction is made of."""

    config: Config
    sizes: MeshSizes
    batch: BatchShape
    cluster: Cluster
    imbalance: float = 1.0
    lines: dict[str, AxisTraffic] = field(default_factory=dict)

    @cached_property
    def one_node(self) -> Cluster:
        """The cluster with all GPUs in one node: what a core does for a message does not depend on the link."""
        return replace(self.cluster, gpus_per_node=sys.maxsize)

    @cached_property
    def slowdown(self) -> float:
        """How much longer a rank computes than alone: its stage's ranks compute at once, others in their pauses."""
        ranks = min(self.cluster.gpus_per_node, self.sizes.dp * self.sizes.dense_shards)
        return max(1.0, ranks / self.cluster.cores) if self.cluster.cores else 1.0

    def send(
        self, axis: str, what: str, pattern: TrafficPattern, num_bytes: float, count: float, window: float, times: float
    ) -> float:
        """Count messages that overlap with ``window`` seconds, ``times`` a step → their exposed seconds, once."""
        group = group_of(axis, self.sizes)
        taken = seconds(self.cluster, group, pattern, num_bytes, count)
        exposed = max(0.0, taken - window)
        self.add(axis, what, num_bytes * times, taken * times, exposed * times, count * times)
        return exposed

    def add(self, axis: str, what: str, num_bytes: float, taken: float, exposed: float, count: float) -> None:
        if not num_bytes:
            return
        line = self.lines.setdefault(what, AxisTraffic(axis, what, group_of(axis, self.sizes)))
        line.num_bytes += num_bytes
        line.seconds += taken
        line.exposed += exposed
        line.work += seconds(self.one_node, line.group, TrafficPattern.ring, num_bytes, count)

    def seconds_on(self, link: str) -> float:
        """Seconds of a step in which what was added so far uses a link, as `where` names it."""
        return sum(line.seconds for line in self.lines.values() if where(self.cluster, line.group) == link)

    @property
    def positions(self) -> int:
        """Of a micro-batch on a rank."""
        return self.batch.sequences * self.batch.length // (self.sizes.cp * self.sizes.tp)

    @property
    def head_seconds(self) -> float:
        """Of a micro-batch's forward through the head, once more for each MTP layer."""
        head = 2.0 * self.positions * count_parameters(self.config.model).head / self.cluster.rates().bfloat16
        return self.slowdown * head * (1 + self.config.model.num_mtp_layers * self.config.trains_mtp)


@dataclass(frozen=True)
class PhaseTimes:
    """Of one micro-batch, without what FSDP2 sends."""

    seconds: float  # of computation and of what is exposed
    on_link: float  # in which the link of FSDP2's collectives is in use
