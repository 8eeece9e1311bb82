"""What fusion knows of the modules that torchvision's families of models share."""

from __future__ import annotations

from torchvision.ops.stochastic_depth import StochasticDepth

from nest_fast import fusion

__all__ = ["KNOWN"]

KNOWN: fusion.Known = {
    **fusion.TORCH,
    StochasticDepth: fusion.as_written(
        "drop_path",
        StochasticDepth,
        rate="p",
        rules=(("{name} drops whole batches", lambda m, x: m.training and m.p != 0.0 and m.mode != "row"),),
    ),
}
