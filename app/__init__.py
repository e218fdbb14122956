"""The page of LoRA Kiln. It uses the trainer; the trainer knows nothing of it."""
