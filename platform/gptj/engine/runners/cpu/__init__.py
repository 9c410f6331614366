"""C++ kernels for CPUs with AVX-512, built on the machine that runs them."""
