"""What a machine is to the cost model: the few numbers of a CPU that decide whether sparsity pays."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from sparseflax.cost.rates import DenseCounts, Rates, SparseCounts, roofline


@dataclass(frozen=True)
class Machine:
    """A machine as the cost model sees it.

    Attributes:
      name: of the processor.
      isa: instruction set of the sparse kernel.
      lanes: float32 per vector register.
      cores: physical cores in use.
      threads: threads that share one convolution.
      l1_bytes, l2_bytes, l3_bytes: data caches as one core sees them; 0 where there is none.
      peak: dense float32 flop/s that `threads` threads reach in a matrix product.
      bandwidth: bytes/s they stream to and from memory.
      alpha: time per kept weight over time per dense weight, when arithmetic is the limit.
      beta: bytes read per kept weight over bytes per dense weight.
      source: where the numbers come from.
      fitted: seconds of each thing that the kernels do; None for a machine of which only the numbers above are
        known.
      fma_cycles: of the sparse kernel's FMA with a memory operand; 0 for what is usual with the instruction set.
      int8_cycles: of its sum of four products of int8, likewise.

    Raises:
      ValueError: a rate or a factor that is not positive, or more cores or caches than any machine has.
    """

    name: str
    isa: str
    lanes: int
    cores: int
    threads: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    peak: float
    bandwidth: float
    alpha: float
    beta: float
    source: str
    fitted: Rates | None = None
    fma_cycles: float = 0.0
    int8_cycles: float = 0.0

    @property
    def rates(self) -> Rates:
        """What the cost model charges: the fitted rates, or those of a machine that only has peak and bandwidth."""
        return self.fitted or roofline(self.peak, self.bandwidth, self.alpha, self.beta)

    def __post_init__(self):
        rates = ("lanes", "cores", "threads", "peak", "bandwidth", "alpha", "beta")
        wrong = {name: getattr(self, name) for name in rates if not 0 < getattr(self, name) < float("inf")}
        cycles = {"fma_cycles": self.fma_cycles, "int8_cycles": self.int8_cycles}
        wrong |= {name: value for name, value in cycles.items() if not 0 <= value < float("inf")}
        if self.fitted and not self.l1_bytes > 0:
            wrong |= {"l1_bytes": self.l1_bytes}
        if wrong:
            raise ValueError(f"machine {self.name!r} has {wrong}: these have to be positive and finite")
        most = dict.fromkeys(("lanes", "cores", "threads"), 1 << 16)
        most |= dict.fromkeys(("l1_bytes", "l2_bytes", "l3_bytes"), 1 << 50)
        if odd := {name: getattr(self, name) for name, bound in most.items() if not 0 <= getattr(self, name) <= bound}:
            raise ValueError(f"machine {self.name!r} has {str(odd)[:200]}, wanted at most 2^16 cores, 0 to 2^50 bytes of cache")

    def __str__(self) -> str:
        return (f"{self.name} ({self.isa}, {self.cores} cores, {self.threads} threads, {self.peak / 1e9:.0f} GFLOP/s, "
                f"{self.bandwidth / 1e9:.0f} GB/s, alpha {self.alpha:.2f}, beta {self.beta:.2f}; {self.source})")


# The machines of Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017): peak is
# MKL's SGEMM, bandwidth is STREAM, alpha is SGEMM's rate over the sparse kernel's on kept weights, beta = 2 stands for
# a 4-byte column index beside each 4-byte value. Caches from Intel's specifications.
ATOM_C2750 = Machine(
    name="Intel Atom C2750", isa="sse4.2", lanes=4, cores=8, threads=8, l1_bytes=24 << 10, l2_bytes=1 << 20, l3_bytes=0,
    peak=62e9, bandwidth=15e9, alpha=1.2, beta=2.0, source="Park et al. 2017")
# The paper's peak and bandwidth exceed one 18-core socket, so both of a two-socket machine are meant.
XEON_E5_2697V4 = Machine(
    name="2x Intel Xeon E5-2697 v4", isa="avx2", lanes=8, cores=36, threads=72, l1_bytes=32 << 10, l2_bytes=256 << 10,
    l3_bytes=45 << 20, peak=2150e9, bandwidth=122e9, alpha=3.0, beta=2.0, source="Park et al. 2017")
# The paper gives no alpha for this one, but 13.9 effective TFLOP/s at density 0.09. Arithmetic is the limit there, so
# alpha = 4.54 / (0.09 * 13.9) = 3.6.
XEON_PHI_7250 = Machine(
    name="Intel Xeon Phi 7250", isa="avx512", lanes=16, cores=68, threads=272, l1_bytes=32 << 10,
    l2_bytes=1 << 20, l3_bytes=0, peak=4540e9, bandwidth=480e9, alpha=3.6, beta=2.0,
    source="Park et al. 2017, alpha derived from its speedup")


# Fitted on AMD EPYCs, one thread: of the sparse kernel on Zen 4 (`split` on Zen 3), of dense layers on Zen 3 (`split` on two
# threads). What an estimate of another machine starts from.
TYPICAL = Rates(
    SparseCounts(fma=2.8e-10, weight=2.4e-10, wait=7e-11, spill=5e-11, kernel_bytes=1e-11, visit=1e-9, accumulate=5.5e-10,
                 store=1.5e-9, pack=9e-10, input_bytes=4e-12, output_bytes=1.5e-11, memory_bytes=2e-11, split=5e-6,
                 call=1.5e-6),
    DenseCounts(flop=1.0e-11, deep=2e-12, shifted=7e-11, patches=1e-11, tiles=1e-8, kernel_bytes=3e-11,
                packed_bytes=1.5e-11, activation_bytes=2e-11, split=4e-6, call=3e-6),
    overlap=1.0)
UNCOUNTED = "far", "lone", "group_taps", "odd", "pixels", "outputs"  # dense rates of earlier versions
TYPICAL_PEAK = 92e9  # flop/s of a matrix product where its dense rates were fitted


def to_dict(machine: Machine) -> dict[str, Any]:
    """A machine in plain dicts, strings and numbers, for `json.dump`; `from_dict` is the inverse."""
    rates = machine.fitted
    plain = rates and {"sparse": rates.sparse._asdict(), "dense": rates.dense._asdict(), "overlap": rates.overlap,
                       "int8": rates.int8 and rates.int8._asdict()}
    return asdict(machine) | {"fitted": plain}


def from_dict(fields: dict[str, Any]) -> Machine:
    """A machine from what `to_dict` returned, checked.

    Raises:
      KeyError, TypeError, ValueError: a field is missing, unknown or out of its range.
    """
    wrong = {name: fields[name] for name in ("l1_bytes", "l2_bytes", "l3_bytes", "cores", "threads", "lanes")
             if type(fields[name]) is not int or not 0 <= fields[name] < 1 << 62}
    if wrong:
        raise ValueError(f"{wrong}, wanted whole numbers that are not negative")
    rates = fields["fitted"]
    return Machine(**{**fields, "fitted": rates and _rates(**rates)})


def _rates(sparse: dict[str, float], dense: dict[str, float], overlap: float, int8: dict[str, float] | None = None) -> Rates:
    """Rates from plain dicts. What was once fitted of counts that no layer has any more is dropped, what was not is typical."""
    counted = {name: rate for name, rate in dense.items() if name not in UNCOUNTED}
    return Rates(SparseCounts(**sparse), TYPICAL.dense._replace(**counted), overlap,
                 None if int8 is None else SparseCounts(**int8))
