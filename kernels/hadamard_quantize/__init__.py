"""Block Hadamard transform, plain or fused with quantization of each token; import `api`."""
