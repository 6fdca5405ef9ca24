"""Studies: what was asked, run, measured and concluded, one folder each."""
