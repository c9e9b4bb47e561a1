"""Speed side by side with peers and with a bound; one module a bench, run by `python -m qlab.bench`."""
