// What transformer_backward_cpu.cpp computes with. No include guard: included once per target, after cpu_matrix.h.

#include "block_attention_cpu_kernel.h"
#include "linear_cpu_kernel.h"
#include "linear_backward_cpu_kernel.h"
