"""Models for other programs: GGUF files for llama.cpp and Ollama, dense folders for transformers and vLLM."""
