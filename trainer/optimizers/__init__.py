"""Optimizers by Kohya names."""
