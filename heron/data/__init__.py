"""From text to batches: corpora.py reads text, which folders.py finds, files.py unpacks, jsonl.py and tables.py split;
prepare.py makes ids of it, much of it in the processes of workers.py; binidx.py keeps them, sampling.py orders the
samples, and loader.py serves them. conversations.py and sequences.py read what is learned in part; packs.py serves it.
"""
