"""Reports of sweeps: tables, figures, a gallery of samples and one page."""
