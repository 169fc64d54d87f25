"""What a TensorCore of each TPU generation can do at most: arithmetic, memory, clock."""

import dataclasses

from msjax.errors import InputError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
  """One TensorCore of a TPU generation.

  A `vmatmul` streams one register through an MXU: 16 rows of bfloat16 or, at half the time, 8 of
  float32. Peak arithmetic settles how long that takes: on v5e 197 TFLOP/s at 1.5 GHz are 131,072 a
  cycle, that is four MXUs of 128 x 128, each with a row a cycle; on v6e 918 at 1.75 GHz are
  524,288, two MXUs of 256 x 256 with two rows a cycle. The schedules agree: they never put two
  `vmatmul` of one MXU closer for long.

  Attributes:
    name: as topologies are called, without the shape.
    mxus: matrix units.
    vmatmul_cycles: time of one bfloat16 `vmatmul`.
    mxu_side: rows and columns of a matrix unit.
    hertz: clock.
    cores: TensorCores of a chip; kernels split their grid over them.
    hbm_bytes_per_second: of the chip.
    hbm_bytes: of the chip, what the compiler lets a program fill.
  """

  name: str
  mxus: int
  vmatmul_cycles: int
  mxu_side: int
  hertz: float
  cores: int
  hbm_bytes_per_second: float
  hbm_bytes: int

  @property
  def flops_per_cycle(self) -> float:
    """Peak bfloat16 arithmetic of one core."""
    return self.mxus * 2 * self.mxu_side**2 * 16 / self.vmatmul_cycles

  @property
  def flops_per_second(self) -> float:
    """Peak bfloat16 arithmetic of the chip."""
    return self.flops_per_cycle * self.hertz * self.cores


CHIPS = {
  "v5e": Chip("v5e", 4, 16, 128, 1.5e9, 1, 819e9, 16_128 << 20),
  "v5p": Chip("v5p", 4, 16, 128, 1.75e9, 2, 2765e9, 98_026 << 20),
  "v6e": Chip("v6e", 2, 8, 256, 1.75e9, 1, 1640e9, 31_994 << 20),
}

# What jax calls a device of each; the two cores of a v5p are one device.
_DEVICE_KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}


def chip_of(topology: str) -> Chip:
  """Returns the chip of a topology such as `v5e:2x2`.

  Raises:
    InputError: it is none of `CHIPS`.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    sides = ", 2x2 for 4 chips, 2x4 for 8, 4x4 for 16" if "-" in name else ""
    raise InputError(
      f"topology {topology!r}: expected one of {', '.join(CHIPS)} and a shape, as in v5e:2x2"
      f"{sides or nearest(name, CHIPS)}"
    )
  return CHIPS[name]


def chip_of_device(kind: str) -> Chip | None:
  """Returns the chip by what `jax.Device.device_kind` says, None where it is none of `CHIPS`."""
  return CHIPS.get(_DEVICE_KINDS.get(kind))
