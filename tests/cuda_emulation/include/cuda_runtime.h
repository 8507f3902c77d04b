// Stands in for CUDA's header: see ../cuda_on_cpu.h.
