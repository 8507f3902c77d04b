"""Searches: rows that a value reads, chooses and forks."""
