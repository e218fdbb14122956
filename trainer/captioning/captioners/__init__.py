"""What can describe a picture: one file for each captioner, found by `CAPTIONERS`."""

from trainer import plugins

__all__ = ["CAPTIONERS"]

CAPTIONERS = plugins.Folder("trainer.captioning.captioners")
