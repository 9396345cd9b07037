"""Triton kernels, installed as ``dmcp.kernels``; importing one imports Triton."""
