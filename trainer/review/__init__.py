"""After training: opening a run, grids of pictures, keeping a file, going on, and a report."""
