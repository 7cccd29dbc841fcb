"""What benchmarks/accuracy.py measures on: beds (a model, its questions), methods, and measures."""
