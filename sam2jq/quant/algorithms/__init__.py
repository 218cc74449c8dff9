"""The algorithms of quantization, one file each: a config, the mathematics for one kernel, and a Transform.

Importing this package defines every class of weight leaf (`quant.leaves.LEAVES`).
"""

from sam2jq.quant.algorithms import activations, lowrank, rotate, smooth

__all__ = ["activations", "lowrank", "rotate", "smooth"]
