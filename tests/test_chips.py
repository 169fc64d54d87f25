"""What chips can do at most, and which there are."""

import pytest

from msjax.errors import InputError
from msjax.kernels import static
from msjax.kernels.chips import CHIPS, chip_of, chip_of_device
from msjax.kernels.schedule import Region


@pytest.mark.parametrize(
  ("chip", "teraflops", "vmatmuls", "cycles"),
  [
    # scores and values of 512 queries, 512 keys and a head of 128: 134 million multiplications
    ("v5e", 197, 2 * 4 * 512 / 16, 1024),
    ("v5p", 459 / 2, 2 * 4 * 512 / 16, 1024),
    ("v6e", 918, 2 * 2 * 512 / 16, 512),  # half of a unit of 256 x 256 is idle
  ],
)
def test_floor_is_peak_arithmetic(chip, teraflops, vmatmuls, cycles):
  chip = CHIPS[chip]
  assert chip.flops_per_cycle * chip.hertz == pytest.approx(teraflops * 1e12, rel=0.005)
  assert Region(0, 1, (), vmatmuls).mxu_cycles(chip) == cycles


def test_the_chip_of_a_topology():
  assert chip_of("v5p:2x2x1") is CHIPS["v5p"]
  with pytest.raises(InputError, match=r"'v5q:2x2'.* v5e, v5p, v6e .*did you mean"):
    chip_of("v5q:2x2")


@pytest.mark.parametrize(
  ("kind", "teraflops"),
  [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v5p", 459), ("TPU v6 lite", 918)],
)
def test_peak_arithmetic_of_a_device(kind, teraflops):
  assert chip_of_device(kind).flops_per_second == pytest.approx(teraflops * 1e12, rel=0.005)


@pytest.mark.parametrize("kind", ["cpu", "TPU v4", "NVIDIA H100 80GB HBM3"])
def test_other_devices_are_not_known(kind):
  assert chip_of_device(kind) is None


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_devices_go_by_the_names_that_jax_has_for_them(topology):
  device = static.devices_of(topology)[0]
  assert chip_of_device(device.device_kind) is chip_of(topology)
  assert device.num_cores == chip_of(topology).cores
