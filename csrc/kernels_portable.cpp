#include "kernels.h"

const gsm::Kernels gsm::kernels_portable = gsm::kKernels;
