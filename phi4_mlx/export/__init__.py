"""Models for other programs: GGUF with a Modelfile for llama.cpp and Ollama, dense folders for transformers and vLLM."""
