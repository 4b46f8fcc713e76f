// What the library was built for, as in "8.0+PTX;9.0a;10.0+PTX": devices it cannot serve are refused before anything is launched.
#include "common.cuh"

#ifndef DITKERNELS_EMULATION

namespace ditkernels {
namespace {

std::string cuda_architectures() { return DITKERNELS_ARCHITECTURES; }

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_FRAGMENT(ditkernels, library) { library.def("cuda_architectures() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", TORCH_BOX(&ditkernels::cuda_architectures));
}

#endif
