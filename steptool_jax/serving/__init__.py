"""The policy as an OpenAI-compatible server, and the environment whose agents come over it."""
