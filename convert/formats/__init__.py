"""Weight files, tensor by tensor: safetensors, GGUF, and torch's .pth without torch."""
