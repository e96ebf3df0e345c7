"""What a plan assumes of GPUs and links: presets from data sheets with assumed efficiencies, or a file of one's own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

from longcat.config_choices import unknown_choice
from longcat.errors import ConfigError
from parallel.device import GPU_PEAKS
from parallel.plan.rates import Rates


@dataclass(frozen=True)
class Cluster:
    """GPUs, their links, and which part of the data sheet's figures a run reaches."""

    name: str
    gpus_per_node: int
    memory_gib: float  # of a GPU
    bfloat16: float  # FLOP/s of dense products, data sheet
    float32: float
    memory: float  # bytes per second, data sheet
    inside: float  # bytes per second that a GPU sends to GPUs of its node, one direction
    network: float  # bytes per second that a GPU sends to other nodes
    inside_latency: float = 10e-6  # seconds that a collective inside a node takes at least; on CPUs with each peer
    network_latency: float = 25e-6
    # Assumptions, not measured here: large bfloat16 GEMMs of trained models reach 65 to 75 % of the data sheet, memory
    # 80 to 90 %, NCCL's large messages 75 to 85 % of the links
    products_reached: float = 0.70
    memory_reached: float = 0.85
    links_reached: float = 0.80
    call: float = 4e-6  # seconds that a kernel takes at least
    # Memory that no tensor has: CUDA context, NCCL's buffers, libraries' workspaces
    reserved_gib: float = 4.0
    fragmented: float = 0.04  # share of the tensors' bytes that the allocator loses to rounding and gaps
    on_gpu: bool = True
    cores: int = 0  # of a node, which its ranks' computation and messages share; 0 = each rank has a device of its own

    def rates(self) -> Rates:
        """What a rank's computation reaches."""
        return Rates(
            self.bfloat16 * self.products_reached,
            self.float32 * self.products_reached,
            self.memory * self.memory_reached,
            self.call,
        )

    def needed(self, num_bytes: float) -> float:
        """Bytes of memory for tensors of ``num_bytes``."""
        return num_bytes * (1 + self.fragmented) + self.reserved_gib * 2**30

    @property
    def capacity(self) -> float:
        """Bytes of a GPU."""
        return self.memory_gib * 2**30


# NVIDIA's data sheets: HBM, and NVLink, which is given there for both directions together (H100 900 GB/s, H800 400,
# B200 1,800); memory as nvidia-smi shows it. Network: one 400 Gb/s NIC a GPU, as in DGX H100 and in most reports of
# H800 clusters; B200: 400 Gb/s too (DGX B200). Products: `GPU_PEAKS`, from which a run's MFU is counted too
def _preset(gpu: str, memory_gib: float, memory: float, inside: float) -> Cluster:
    bfloat16, float32 = GPU_PEAKS[gpu]
    return Cluster(gpu.lower(), 8, memory_gib, bfloat16, float32, memory, inside, network=50e9)


PRESETS = {
    "h100": _preset("H100", memory_gib=79.6, memory=3.35e12, inside=450e9),
    "h800": _preset("H800", memory_gib=79.6, memory=3.35e12, inside=200e9),
    "h200": _preset("H200", memory_gib=140.4, memory=4.8e12, inside=450e9),
    "b200": _preset("B200", memory_gib=179.1, memory=8e12, inside=900e9),
}


MAY_BE_ZERO = ("call", "reserved_gib", "fragmented", "inside_latency", "network_latency", "cores")


def find_cluster(name: str) -> Cluster:
    """A preset, or the cluster that a YAML file describes by the fields of `Cluster`.

    Raises:
        ConfigError: no such preset or file, or a field that is unknown, missing or no positive number.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise unknown_choice("plan.cluster", name, [*PRESETS, "FILE.yaml"])
    if not path.is_file():
        raise ConfigError(f"plan.cluster={name} is no file; use {', '.join(PRESETS)}, or write one with their fields")
    return from_yaml(path)


def from_yaml(path: Path) -> Cluster:
    """The cluster in a file: the fields of `Cluster`, or `like: h800` and those that differ."""
    import yaml

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"plan.cluster={path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"plan.cluster={path} must have lines like `network: 50e9`")
    values = {"name": path.stem, **given}
    base = values.pop("like", None)
    if base is not None and base not in PRESETS:
        raise unknown_choice(f"`like` in plan.cluster={path}", str(base), list(PRESETS))
    known = {one.name: one for one in fields(Cluster)}
    for name, value in values.items():
        if name not in known:
            raise unknown_choice(f"a field of plan.cluster={path}", str(name), list(known))
        if name not in ("name", "on_gpu"):
            values[name] = _number(path, name, value)
    if base is not None:
        return replace(PRESETS[base], **values)
    required = ("gpus_per_node", "memory_gib", "bfloat16", "float32", "memory", "inside", "network")
    missing = [name for name in required if name not in values]
    if missing:
        raise ConfigError(f"plan.cluster={path} lacks {', '.join(missing)}; add them, or `like: h800`")
    return Cluster(**values)


def _number(path: Path, name: str, value: object) -> float | int:
    try:
        number = float(value)  # type: ignore[arg-type]  # YAML reads 50e9 as text
    except (TypeError, ValueError):
        number = -1.0
    least = 0.0 if name in MAY_BE_ZERO else 1e-9
    if not least <= number < float("inf"):
        raise ConfigError(f"{name}={value} in plan.cluster={path} must be a positive number")
    return int(number) if name in ("gpus_per_node", "cores") else number
