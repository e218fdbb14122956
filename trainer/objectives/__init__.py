"""Noise, targets and losses, as pure functions of tensors."""
