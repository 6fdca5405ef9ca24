"""Programs around an ensemble, to start from."""
