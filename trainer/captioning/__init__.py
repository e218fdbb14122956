"""Captions: what writes them, what edits them, and what they are measured by."""
