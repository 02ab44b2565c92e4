"""What a person sees of a cell: its files, pictures, progress and dashboards."""
