"""StepTool in JAX: step-grained reinforcement learning for tool-using language models."""
