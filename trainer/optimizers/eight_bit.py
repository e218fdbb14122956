"""bitsandbytes: optimizer states in 8 bits, or paged out to host memory."""

from trainer.optimizers._base import Recipe

RECIPES = (
    *(
        Recipe(name=name, path=f"bitsandbytes.optim.{name}", equivalent="AdamW")
        for name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "PagedAdamW32bit")
    ),
    *(
        Recipe(name=name, path=f"bitsandbytes.optim.{name}", equivalent="Lion")
        for name in ("Lion8bit", "PagedLion8bit")
    ),
    Recipe(
        name="SGDNesterov8bit",
        path="bitsandbytes.optim.SGD8bit",
        equivalent="SGDNesterov",
        fixed={"nesterov": True},
        defaults={"momentum": 0.9},
    ),
)
