"""Shipped for study: absorbed orders, ranks lowered during training, thresholded bonds, the elementwise metric."""

from tensornet_compress.experimental.absorbed_orders import FreeOrders, absorb_orders, free_orders, reordered
from tensornet_compress.experimental.bonds import shrink_bonds, threshold_bonds
from tensornet_compress.experimental.elementwise import weighted_cores
from tensornet_compress.experimental.gradual_ranks import GradualReport, reduce_gradually

__all__ = [
    "FreeOrders",
    "GradualReport",
    "absorb_orders",
    "free_orders",
    "reduce_gradually",
    "reordered",
    "shrink_bonds",
    "threshold_bonds",
    "weighted_cores",
]
