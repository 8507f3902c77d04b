"""The training of conditioned policies: rollouts at weights drawn at random, and the trainer."""
