"""Environment variables with which a run would not repeat bit by bit are refused by name and value."""

from __future__ import annotations

import pytest

from longcat.errors import ConfigError
from parallel.environment import check_determinism


@pytest.mark.parametrize(
    ("variable", "value", "on_gpu", "compiled"),
    [
        ("CUBLAS_WORKSPACE_CONFIG", ":0:0", True, False),
        ("CUBLAS_WORKSPACE_CONFIG", "", True, False),
        ("OMP_DYNAMIC", "TRUE", False, False),
        ("TORCHINDUCTOR_MAX_AUTOTUNE", "1", False, True),
        ("TORCHINDUCTOR_COORDINATE_DESCENT_TUNING", "1", True, True),
    ],
)
def test_variable_that_breaks_repeats_is_refused(variable: str, value: str, on_gpu: bool, compiled: bool) -> None:
    with pytest.raises(ConfigError, match=f"{variable}={value}: .*unset it.*train.deterministic=false"):
        check_determinism({variable: value}, on_gpu, compiled)


@pytest.mark.parametrize(
    ("environment", "on_gpu", "compiled"),
    [
        ({}, True, True),
        ({"CUBLAS_WORKSPACE_CONFIG": ":16:8", "OMP_DYNAMIC": "false"}, True, True),
        ({"CUBLAS_WORKSPACE_CONFIG": ":0:0"}, False, True),  # no cuBLAS on a CPU
        ({"TORCHINDUCTOR_MAX_AUTOTUNE": "1"}, True, False),  # nothing is compiled
        ({"TORCHINDUCTOR_MAX_AUTOTUNE": "0"}, True, True),
    ],
)
def test_harmless_environment_is_accepted(environment: dict[str, str], on_gpu: bool, compiled: bool) -> None:
    check_determinism(environment, on_gpu, compiled)
