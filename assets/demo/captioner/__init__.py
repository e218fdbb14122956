"""The demo world's captioner: a small BLIP, and how it was trained."""
