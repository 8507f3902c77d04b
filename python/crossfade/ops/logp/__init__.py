"""Log-probs of a linear head: `api` checks and registers, `tiles` and `mean` compute."""
