"""What compiled kernels share: vector types, memory and threads; and the passes over all residuals."""
