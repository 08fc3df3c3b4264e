"""How routed experts may be cut: over ep, their widths over etp; both together cut the ranks of a pipeline stage."""

import math

from unimega.config.model import ModelSpec
from unimega.config.schema import ParallelConfig
from unimega.errors import ConfigError


def check(model: ModelSpec, parallel: ParallelConfig, *, world_size: int) -> None:
    """Refuse sizes that do not divide. Sizes themselves are at least 1, and those of the other mesh fit the world.

    Raises:
        ConfigError: the first rule that is broken.
    """
    ep, etp, tp = parallel.ep, parallel.etp, parallel.tp
    sparse = [(number, layer.experts) for number, layer in enumerate(model.layers) if layer.experts is not None]
    for name, size in (("ep", ep), ("etp", etp)):
        if size > 1 and not sparse:
            raise ConfigError(
                f"parallel.{name}={size}: the model has no routed experts to cut. Set parallel.{name} = 1."
            )
    if etp not in (1, tp):
        raise ConfigError(f"parallel.etp={etp} is neither 1 nor parallel.tp={tp}. Set it to one of the two.")
    ranks = world_size // (parallel.pp * parallel.cp)
    if ranks % (ep * etp):
        processes = math.lcm(tp, ep * etp) * parallel.pp
        raise ConfigError(
            f"parallel.ep={ep} * etp={etp} = {ep * etp} does not divide the {ranks} rank(s) of a pipeline stage "
            f"(dp={ranks // tp} * tp={tp}). Start a multiple of {processes} processes, or pick an ep that divides "
            f"{ranks // etp}."
        )
    for number, experts in sparse:
        if experts.number % ep:
            raise ConfigError(
                f"parallel.ep={ep} does not divide the {experts.number} experts of layer {number}. Pick a divisor."
            )
        for what, width, size in (("FFN", experts.width, etp), ("shared FFN", experts.shared_width, tp)):
            if width % size:
                raise ConfigError(
                    f"{what} width {width} of the experts of layer {number} is not divisible by "
                    f"parallel.{'etp' if what == 'FFN' else 'tp'}={size}. Pick a divisor."
                )
