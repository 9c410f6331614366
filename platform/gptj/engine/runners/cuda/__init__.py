"""The engine's runner for NVIDIA GPUs: fused weights, Triton kernels and CUDA graphs."""
