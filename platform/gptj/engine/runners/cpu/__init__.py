"""C++ kernels for CPUs with AVX-512 or AVX2, built on the machine that runs them."""
