"""One file per claim. `results/` holds the committed full runs, which the documentation quotes."""
