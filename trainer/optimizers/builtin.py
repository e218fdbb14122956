"""Optimizers of torch itself under Kohya's names."""

from trainer.optimizers._base import Recipe

RECIPES = (
    Recipe(name="AdamW", path="torch.optim.AdamW"),
    Recipe(
        name="SGDNesterov",
        path="torch.optim.SGD",
        fixed={"nesterov": True},
        defaults={"momentum": 0.9},
    ),
)
