"""The files of a cell and of a sweep: identity, record, reader, plan, status."""
