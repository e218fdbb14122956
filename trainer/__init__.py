"""The engine of LoRA Kiln. Works with no page."""
