"""Many prompts at once: they are read from files, and results are files that can be resumed."""
