"""The runner's parts. Knows no area: an experiment is found by name."""
