//! Checkpoint files without MLX: GGUF and safetensors readers over untrusted bytes.
