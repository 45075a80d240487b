"""Products with weights whose codes are single scalars: uniform grids, and a table of levels per row."""
