"""One file an experiment. Each sets `EXPERIMENT`; the page shows them in their order."""
