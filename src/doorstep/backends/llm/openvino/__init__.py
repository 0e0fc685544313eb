"""OpenVINO GenAI: GGUF files and OpenVINO folders."""
