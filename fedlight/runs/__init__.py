"""The files of a cell and of a sweep: identity, record, plan, status."""
