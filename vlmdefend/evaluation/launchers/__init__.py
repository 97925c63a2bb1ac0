"""Run the cells of a plan."""
