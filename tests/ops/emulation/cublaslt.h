// What csrc/ uses of cuBLASLt, on the host: descriptors that are checked, an algorithm that is asked for and handed back, and the
// product with its epilogue as cuBLAS's documentation words it, matrices column by column.
//
// Whatever that documentation forbids or leaves undefined ends in a fault: operands that do not fit together or reach beyond their
// tensors, an epilogue without its bias or its auxiliary matrix, one of them without an epilogue, alignments that were
// promised and are not kept, an algorithm or a workspace of another problem, a descriptor used after its end or twice ended.
#pragma once

#include <array>

#include "emulation.h"

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_ALLOC_FAILED = 3, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasComputeType_t { CUBLAS_COMPUTE_16F, CUBLAS_COMPUTE_32F };
enum cudaDataType_t { CUDA_R_16F, CUDA_R_16BF, CUDA_R_32F };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasLtEpilogue_t {
  CUBLASLT_EPILOGUE_DEFAULT = 1,
  CUBLASLT_EPILOGUE_BIAS = 4,
  CUBLASLT_EPILOGUE_GELU = 32,
  CUBLASLT_EPILOGUE_GELU_BIAS = 32 | 4,
  CUBLASLT_EPILOGUE_GELU_AUX = 32 | 128,
  CUBLASLT_EPILOGUE_GELU_AUX_BIAS = 32 | 128 | 4,
  CUBLASLT_EPILOGUE_DGELU = 64 | 128,
  CUBLASLT_EPILOGUE_DGELU_BGRAD = 64 | 128 | 16,
};
enum cublasLtMatmulDescAttributes_t {
  CUBLASLT_MATMUL_DESC_TRANSA,
  CUBLASLT_MATMUL_DESC_TRANSB,
  CUBLASLT_MATMUL_DESC_EPILOGUE,
  CUBLASLT_MATMUL_DESC_BIAS_POINTER,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER,
  CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD,
};
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
};
enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };

using cudaStream_t = void*;

namespace emulation {

inline int64_t descriptors = 0;  // that have not been ended
inline bool memory_is_full = false;
// The epilogue for which there is no algorithm, and whether a status says so or an answer of none. For operands of less than 16 bytes'
// alignment there never is one.
inline int without_algorithm = 0;
inline bool lack_is_a_status = false;

struct Descriptor {
  bool alive = true;
  Descriptor() { ++descriptors; }
};

struct Operation : Descriptor {
  cublasOperation_t trans_a = CUBLAS_OP_N, trans_b = CUBLAS_OP_N;
  cublasLtEpilogue_t epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  void *bias = nullptr, *aux = nullptr;
  int64_t aux_stride = 0;
};

struct Layout : Descriptor {
  cudaDataType_t type;
  int64_t rows, columns, stride;
};

struct Preference : Descriptor {
  uint64_t workspace = 0;
  uint32_t schemes = ~0u;
  std::array<uint32_t, 4> alignments{256, 256, 256, 256};
};

constexpr uint64_t WORKSPACE = 4096;

inline void demand(bool met, const char* what) {
  if (!met) throw Fault(std::string("cuBLASLt: ") + what);
}

template <typename Kind>
const Kind& alive(const Kind* descriptor) {
  demand(descriptor != nullptr && descriptor->alive, "a descriptor that is not there");
  return *descriptor;
}

// Ended descriptors are kept, so that their use is noticed.
template <typename Kind>
cublasStatus_t end(Kind* descriptor) {
  demand(descriptor->alive, "a descriptor ended twice");
  descriptor->alive = false;
  --descriptors;
  return CUBLAS_STATUS_SUCCESS;
}

template <typename Value>
void take(Value& into, const void* value, size_t bytes) {
  demand(bytes == sizeof(Value), "an attribute of another size");
  std::memcpy(&into, value, bytes);
}

inline void demand_inside(const void* data, int64_t bytes) {
  const char* first = static_cast<const char*>(data);
  for (const Range& range : ranges)
    if (first >= range.data && first + bytes <= range.data + range.bytes) return;
  throw Fault("cuBLASLt: an operand reaches beyond its tensor");
}

inline int64_t size_of(cudaDataType_t type) { return type == CUDA_R_32F ? 4 : 2; }

inline float value_at(const void* data, cudaDataType_t type, int64_t at) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  if (type == CUDA_R_16BF) return static_cast<float>(static_cast<const BFloat16*>(data)[at]);
  return static_cast<float>(static_cast<const Half*>(data)[at]);
}

inline void put(void* data, cudaDataType_t type, int64_t at, float value) {
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  if (type == CUDA_R_16BF)
    static_cast<BFloat16*>(data)[at] = static_cast<BFloat16>(value);
  else
    static_cast<Half*>(data)[at] = static_cast<Half>(value);
}

struct Gelu {
  double value, slope;
};

inline Gelu gelu(double z) {
  const double root = std::sqrt(2.0 / 3.14159265358979323846), kappa = 0.044715;
  const double t = std::tanh(root * (z + kappa * z * z * z));
  return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * root * (1 + 3 * kappa * z * z)};
}

struct Sizes {
  int64_t rows, columns, depth;
};

inline Sizes fitting(const Operation& operation, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  demand(operation.trans_b == CUBLAS_OP_N, "a right operand that is transposed, which nothing here asks for");
  const bool transposed = operation.trans_a == CUBLAS_OP_T;
  const Sizes sizes{transposed ? a.columns : a.rows, b.columns, transposed ? a.rows : a.columns};
  demand(sizes.depth == b.rows && d.rows == sizes.rows && d.columns == sizes.columns, "operands that do not fit together");
  demand(c.rows == d.rows && c.columns == d.columns && c.stride == d.stride, "C unlike D");
  demand(sizes.rows > 0 && sizes.columns > 0 && sizes.depth > 0, "an empty product");
  for (const Layout* layout : {&a, &b, &c, &d}) {
    demand(layout->stride >= layout->rows, "columns that overlap");
    demand(layout->type == d.type && d.type != CUDA_R_32F, "dtypes that differ");
  }
  return sizes;
}

inline std::array<uint64_t, 8> problem_of(const Operation& operation, const Sizes& sizes, cudaDataType_t type) {
  return {
      static_cast<uint64_t>(sizes.rows), static_cast<uint64_t>(sizes.columns), static_cast<uint64_t>(sizes.depth),
      static_cast<uint64_t>(type) * 2 + operation.trans_a, static_cast<uint64_t>(operation.epilogue)};
}

}  // namespace emulation

using cublasLtHandle_t = int*;
using cublasLtMatmulDesc_t = emulation::Operation*;
using cublasLtMatrixLayout_t = emulation::Layout*;
using cublasLtMatmulPreference_t = emulation::Preference*;

struct cublasLtMatmulAlgo_t {
  std::array<uint64_t, 8> problem;
  std::array<uint32_t, 4> alignments;
};

struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
};

inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  if (emulation::memory_is_full) return CUBLAS_STATUS_ALLOC_FAILED;
  *handle = new int(1);
  return CUBLAS_STATUS_SUCCESS;
}

inline const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS ? "success" : "the resource allocation failed";
}

inline cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* made, cublasComputeType_t compute, cudaDataType_t scale) {
  emulation::demand(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F, "sums that are not of fp32");
  *made = new emulation::Operation;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) { return emulation::end(operation); }

inline cublasStatus_t cublasLtMatmulDescSetAttribute(
    cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute, const void* value, size_t bytes) {
  emulation::alive(operation);
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      emulation::take(operation->trans_a, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
      emulation::take(operation->trans_b, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      emulation::take(operation->epilogue, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER:
      emulation::take(operation->bias, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER:
      emulation::take(operation->aux, value, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD:
      emulation::take(operation->aux_stride, value, bytes);
      break;
  }
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutCreate(
    cublasLtMatrixLayout_t* made, cudaDataType_t type, uint64_t rows, uint64_t columns, int64_t stride) {
  *made = new emulation::Layout;
  (*made)->type = type;
  (*made)->rows = static_cast<int64_t>(rows);
  (*made)->columns = static_cast<int64_t>(columns);
  (*made)->stride = stride;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return emulation::end(layout); }

inline cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* made) {
  *made = new emulation::Preference;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) { return emulation::end(preference); }

inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(
    cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute, const void* value, size_t bytes) {
  emulation::alive(preference);
  if (attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES)
    emulation::take(preference->workspace, value, bytes);
  else if (attribute == CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK)
    emulation::take(preference->schemes, value, bytes);
  else
    emulation::take(preference->alignments[attribute - CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
    cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int wanted,
    cublasLtMatmulHeuristicResult_t* found, int* count) {
  using namespace emulation;
  demand(handle != nullptr && *handle == 1, "no handle");
  const Sizes sizes = fitting(alive(operation), alive(a), alive(b), alive(c), alive(d));
  demand((alive(preference).schemes & ~CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE) == 0, "partial sums that are not of fp32");
  demand(wanted == 1 && preference->workspace >= WORKSPACE, "no room for a result");
  const auto& promised = preference->alignments;
  if (operation->epilogue == without_algorithm || *std::min_element(promised.begin(), promised.end()) < 16) {
    *count = 0;
    return lack_is_a_status ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS;
  }
  found->algo = {problem_of(*operation, sizes, d->type), preference->alignments};
  found->workspaceSize = WORKSPACE;
  *count = 1;
  return CUBLAS_STATUS_SUCCESS;
}

inline cublasStatus_t cublasLtMatmul(
    cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
    const void* b, cublasLtMatrixLayout_t b_layout, const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
    cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t workspace_bytes, cudaStream_t) {
  using namespace emulation;
  demand(handle != nullptr && *handle == 1, "no handle");
  const Layout &of_a = alive(a_layout), &of_b = alive(b_layout), &of_d = alive(d_layout);
  const Sizes sizes = fitting(alive(operation), of_a, of_b, alive(c_layout), of_d);
  demand(algorithm->problem == problem_of(*operation, sizes, of_d.type), "an algorithm chosen for another problem");
  const std::array<const void*, 4> pointers{a, b, c, d};
  for (size_t i = 0; i < pointers.size(); ++i)
    demand(
        reinterpret_cast<uintptr_t>(pointers[i]) % algorithm->alignments[i] == 0, "an alignment that was promised and is not kept");
  demand(workspace != nullptr && workspace_bytes == WORKSPACE, "another workspace than was asked for");
  std::memset(workspace, 0xff, workspace_bytes);
  demand(*static_cast<const float*>(alpha) == 1.0f && *static_cast<const float*>(beta) == 0.0f, "a scaled product");

  const int epilogue = operation->epilogue, size = static_cast<int>(size_of(of_d.type));
  const bool backward = epilogue & 64, biased = epilogue & 4, summed = epilogue & 16, with_aux = epilogue & 128;
  demand((operation->bias != nullptr) == (biased || summed), "a bias and an epilogue that do not go together");
  demand((operation->aux != nullptr) == with_aux, "an auxiliary matrix and an epilogue that do not go together");
  if (with_aux) {
    demand(operation->aux_stride >= sizes.rows && operation->aux_stride % 8 == 0, "an auxiliary matrix of another shape");
    demand(reinterpret_cast<uintptr_t>(operation->aux) % 16 == 0, "a misaligned auxiliary matrix");
    demand_inside(operation->aux, ((sizes.columns - 1) * operation->aux_stride + sizes.rows) * size);
  }
  if (operation->bias != nullptr) demand_inside(operation->bias, sizes.rows * size);
  demand_inside(a, ((of_a.columns - 1) * of_a.stride + of_a.rows) * size);
  demand_inside(b, ((of_b.columns - 1) * of_b.stride + of_b.rows) * size);
  demand_inside(d, ((of_d.columns - 1) * of_d.stride + of_d.rows) * size);

  const bool transposed = operation->trans_a == CUBLAS_OP_T;
  for (int64_t row = 0; row < sizes.rows; ++row) {
    float total = 0.0f;
    const float bias = biased ? value_at(operation->bias, of_d.type, row) : 0.0f;
    for (int64_t column = 0; column < sizes.columns; ++column) {
      float sum = 0.0f;
      for (int64_t k = 0; k < sizes.depth; ++k)
        sum += value_at(a, of_a.type, transposed ? row * of_a.stride + k : k * of_a.stride + row) *
               value_at(b, of_b.type, column * of_b.stride + k);
      const int64_t at_aux = column * operation->aux_stride + row;
      if (backward) {
        sum *= static_cast<float>(gelu(value_at(operation->aux, of_d.type, at_aux)).slope);
        total += sum;
      } else {
        sum += bias;
        if (with_aux) put(operation->aux, of_d.type, at_aux, sum);
        if (epilogue & 32) sum = static_cast<float>(gelu(sum).value);
      }
      put(d, of_d.type, column * of_d.stride + row, sum);
    }
    if (summed) put(operation->bias, of_d.type, row, total);
  }
  return CUBLAS_STATUS_SUCCESS;
}
