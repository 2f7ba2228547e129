"""The promises that must hold under attack, each a function `run(trials, seed) -> Result`.

`make test` runs every one with few trials; `make torture` runs the figures that docs/reliability.md quotes.
"""
