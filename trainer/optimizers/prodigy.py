"""Prodigy (Mishchenko and Defazio 2023, arXiv:2306.06101): finds the size of the rate by itself."""

from trainer.optimizers._base import Recipe

RECIPES = (Recipe(name="Prodigy", path="prodigyopt.Prodigy"),)
