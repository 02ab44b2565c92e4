"""A sweep at a glance: its cells as frames, tables, figures and one page."""
