"""Value heads are trained on rollouts of the base: their rows, what is run, and the trainer."""
