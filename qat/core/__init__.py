"""Numbers: formats, fake quantization and its kernels, quantizers, and the settings that choose among them."""
