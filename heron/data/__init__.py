"""From text to batches: corpora.py reads text (folders.py finds it, files.py unpacks it, jsonl.py and tables.py take rows
apart), prepare.py makes ids of it, binidx.py keeps them, sampling.py orders the samples, and loader.py serves them."""
