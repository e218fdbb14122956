"""The demo world: drawn portraits, a base model trained on them, and one new subject."""
