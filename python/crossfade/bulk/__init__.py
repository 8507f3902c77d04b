"""Many prompts: they are read from files and decoded in one loop; results can be resumed."""
