"""Generation: prompts, sampling, memory plans and text."""
