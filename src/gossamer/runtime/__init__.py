"""The sparse CPU runtime: plain models with zeros in them, run by kernels that use the zeros."""
