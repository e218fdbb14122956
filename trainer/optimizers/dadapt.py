"""D-Adaptation (Defazio and Mishchenko 2023, arXiv:2301.07733): finds the size of the rate by itself."""

from trainer.optimizers._base import Recipe

RECIPES = (
    Recipe(name="DAdaptation", path="dadaptation.experimental.DAdaptAdamPreprint", equivalent="Prodigy"),
    *(
        Recipe(name=name, path=f"dadaptation.experimental.{name}", equivalent="Prodigy")
        for name in ("DAdaptAdamPreprint", "DAdaptAdanIP")
    ),
    *(
        Recipe(name=name, path=f"dadaptation.{name}", equivalent="Prodigy")
        for name in ("DAdaptAdaGrad", "DAdaptAdam", "DAdaptAdan", "DAdaptLion", "DAdaptSGD")
    ),
)
