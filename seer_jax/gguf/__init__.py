"""GGUF files of llama.cpp as base models: header, configuration and tokenizer, without the weights, which `convert` reads."""
