"""Systems of the literature that decode, correct, judge and train with several models."""
