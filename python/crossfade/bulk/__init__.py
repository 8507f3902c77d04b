"""Many prompts: read from files, and their results written as JSON lines, resumable."""
