"""llama.cpp, by xllamacpp: GGUF files."""
