// What the library was built for and with: Python uses it to refuse devices and drivers before any launch. Also the registers,
// memory and occupancy of every kernel on a device, for `ditkernels info`.
#include "common.cuh"

#ifndef DITKERNELS_EMULATION

namespace ditkernels {
namespace {

// By this string the package knows the library before it loads it: kind, version, and a hash of the ops' schemas.
[[gnu::used]] const char MARK[] = DITKERNELS_MARK;

// For example "8.0+PTX;9.0a;10.0+PTX".
std::string cuda_architectures() { return DITKERNELS_ARCHITECTURES; }

// For example 13000 for CUDA 13.0.
int64_t cuda_runtime() { return CUDART_VERSION; }

constexpr int COLUMNS = 6;

void check(cudaError_t error, const std::string& kernel) {
  STD_TORCH_CHECK(
      error == cudaSuccess, "cuda_kernel_attributes: ", kernel, ": ", cudaGetErrorString(error), "; the library is built for ",
      DITKERNELS_ARCHITECTURES);
}

// One row for each kernel, int64 on the CPU: registers of a thread, bytes of local memory of a thread (it holds spilled registers),
// bytes of shared memory of a block, threads of a block, blocks that a multiprocessor holds, architecture of the code in use (90 is
// sm_90). The string holds the kernels' names in the same order, one on each line.
std::tuple<Tensor, std::string> cuda_kernel_attributes(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  const Tensor table = torch::stable::empty({static_cast<int64_t>(kernels().size()), COLUMNS}, ScalarType::Long);
  int64_t* row = static_cast<int64_t*>(table.data_ptr());
  std::string names;
  for (const Kernel& kernel : kernels()) {
    cudaFuncAttributes found;
    check(cudaFuncGetAttributes(&found, kernel.function), kernel.name);
    if (kernel.shared > SHARED_UNASKED)
      check(cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared), kernel.name);
    int blocks = 0;
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel.function, kernel.threads, kernel.shared), kernel.name);
    const int64_t values[COLUMNS] = {
        found.numRegs,
        static_cast<int64_t>(found.localSizeBytes),
        static_cast<int64_t>(found.sharedSizeBytes) + kernel.shared,
        kernel.threads,
        blocks,
        found.binaryVersion};
    for (int64_t value : values) *row++ = value;
    names += (names.empty() ? "" : "\n") + kernel.name;
  }
  return {table, names};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_FRAGMENT(ditkernels, library) {
  library.def("cuda_architectures() -> str");
  library.def("cuda_runtime() -> int");
  library.def("cuda_kernel_attributes(int device) -> (Tensor attributes, str names)");
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_architectures", TORCH_BOX(&ditkernels::cuda_architectures));
  library.impl("cuda_runtime", TORCH_BOX(&ditkernels::cuda_runtime));
  library.impl("cuda_kernel_attributes", TORCH_BOX(&ditkernels::cuda_kernel_attributes));
}

#endif
