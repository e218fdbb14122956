"""Schedule-free optimizers (Defazio et al. 2024, arXiv:2405.15682): averaging in place of a schedule."""

from trainer.optimizers._base import Recipe

RECIPES = tuple(
    Recipe(name=name, path=f"schedulefree.{name}", schedule_free=True)
    for name in ("AdamWScheduleFree", "RAdamScheduleFree", "SGDScheduleFree")
)
