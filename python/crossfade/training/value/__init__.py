"""The training of value heads: rollouts of the base, what is run on them, and the trainer."""
