"""Weight files, tensor by tensor: safetensors, and torch's .pth without torch."""
