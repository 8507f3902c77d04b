"""Models as Hugging Face runs them: for any model, and the truth that the engine is held to."""
