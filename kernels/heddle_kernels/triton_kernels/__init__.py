"""The operations as Triton kernels, for NVIDIA GPUs; in Triton's interpreter they run on any machine, for tests."""
