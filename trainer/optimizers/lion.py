"""Lion (Chen et al. 2023, arXiv:2302.06675)."""

from trainer.optimizers._base import Recipe

RECIPES = (Recipe(name="Lion", path="lion_pytorch.Lion"),)
