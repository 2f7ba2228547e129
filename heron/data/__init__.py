"""From text to batches: corpora.py reads text, prepare.py makes ids of it, binidx.py keeps them, sampling.py orders the
samples, and loader.py serves them."""
