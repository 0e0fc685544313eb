"""vLLM, as a child process of the worker."""
