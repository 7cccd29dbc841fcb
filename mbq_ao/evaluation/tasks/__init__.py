"""Tasks that need no network, for lm-eval: the YAML files, their data, and how the data was made (make_parquet.py)."""
