#include "kernels.h"

const gsm::Kernels gsm::kernels_avx2 = gsm::kKernels;
