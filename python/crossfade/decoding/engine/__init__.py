"""The engine: rows of all models step together, on kernels and caches of its own."""
