"""Own kernels for CPUs, in C: compiled when a process first needs them."""
