"""Reports: a run directory's `results.json`, `metrics.jsonl` and `config.yaml` as a table, figures and one page."""
