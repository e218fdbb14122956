"""The engine of LoRA Kiln. Works with no page."""

from trainer import quiet

quiet.hush()  # before any module imports the libraries
