"""Network types: one file each."""
