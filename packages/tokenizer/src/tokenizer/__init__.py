"""Visual tokenizer with look-up-free quantization: images to token indices and back."""
