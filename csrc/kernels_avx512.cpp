#include "kernels.h"

const gsm::Kernels gsm::kernels_avx512 = gsm::kKernels;
