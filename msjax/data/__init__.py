"""Data: what lies in files, how it becomes grids, and how it is shown."""
