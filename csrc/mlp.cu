// The halves of `mlp` that touch its hidden layer: products by cuBLASLt with GELU and the sum of its bias' gradient as epilogues.
// Formulas and names are those at the top of ditkernels/ops/mlp.py; matrices are packed, row by row.
//
//   linear_gelu            h (M, F) = GELU(z), z = x (M, D) · weightᵀ (F, D) + bias. Reads x and the weight, writes h, and z where it is
//                          kept, in its dtype; GELU is taken of z as summed, in fp32.
//   gelu_linear_backward   dz (M, F) = (dy (M, E) · weight (E, F)) ⊙ GELU'(z), dbias = sum of dz over rows. Reads dy, the weight and z,
//                          writes dz and dbias: the gradient of h never exists.
//
// cuBLASLt's GELU is the tanh form. Its matrices lie column by column, so that each of ours is its transpose: it computes
// outᵀ (F, M) = op(weight) · leftᵀ, and its epilogues add the bias to, and sum the gradient over, what are columns to it.
//
// cuBLASLt is looked for when first asked for, among the libraries that torch has loaded: this library then also loads beside a
// torch without it. The algorithm is its own first choice for a shape and the alignments of the tensors, the same each time;
// partial sums over the inner dimension are kept in fp32. Same inputs, aligned alike, on the same kind of GPU, same bits.
#include "common.cuh"

#ifdef DITKERNELS_EMULATION
#include "cublaslt.h"
#define DITKERNELS_CUBLASLT
#elif __has_include(<cublasLt.h>)
#include <cublasLt.h>
#include <dlfcn.h>
#define DITKERNELS_CUBLASLT
#endif

#ifdef DITKERNELS_CUBLASLT

#include <array>
#include <map>
#include <mutex>

namespace ditkernels {
namespace {

constexpr uint64_t MOST_WORKSPACE = 32 << 20;
// cuBLASLt asks for no more; torch allocates at 512 bytes, the emulation at 64.
#ifndef DITKERNELS_EMULATION
constexpr uint64_t LARGEST_ALIGNMENT = 256;
#else
constexpr uint64_t LARGEST_ALIGNMENT = 64;
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The library
// ---------------------------------------------------------------------------------------------------------------------

#define DITKERNELS_NAMED(name) decltype(&::name) name
struct Blas {
  std::string missing;  // why there is none, or ""
  DITKERNELS_NAMED(cublasLtCreate);
  DITKERNELS_NAMED(cublasLtGetStatusString);
  DITKERNELS_NAMED(cublasLtMatmul);
  DITKERNELS_NAMED(cublasLtMatmulAlgoGetHeuristic);
  DITKERNELS_NAMED(cublasLtMatmulDescCreate);
  DITKERNELS_NAMED(cublasLtMatmulDescDestroy);
  DITKERNELS_NAMED(cublasLtMatmulDescSetAttribute);
  DITKERNELS_NAMED(cublasLtMatmulPreferenceCreate);
  DITKERNELS_NAMED(cublasLtMatmulPreferenceDestroy);
  DITKERNELS_NAMED(cublasLtMatmulPreferenceSetAttribute);
  DITKERNELS_NAMED(cublasLtMatrixLayoutCreate);
  DITKERNELS_NAMED(cublasLtMatrixLayoutDestroy);
};
#undef DITKERNELS_NAMED

#ifndef DITKERNELS_EMULATION
#define DITKERNELS_TEXT_OF(value) #value
#define DITKERNELS_TEXT(value) DITKERNELS_TEXT_OF(value)
constexpr const char* LIBRARY = "libcublasLt.so." DITKERNELS_TEXT(CUBLAS_VER_MAJOR);

template <typename Function>
void find(void* library, Blas& blas, Function& function, const char* name) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) blas.missing = std::string(LIBRARY) + " has no " + name;
}
#define DITKERNELS_FIND(name) find(library, found, found.name, #name)
#else
#define DITKERNELS_FIND(name) found.name = &::name
#endif

Blas find_blas() {
  Blas found{};
#ifndef DITKERNELS_EMULATION
  void* library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.missing = std::string(LIBRARY) + ", which the library was built for, is not to be found";
    return found;
  }
#endif
  DITKERNELS_FIND(cublasLtCreate);
  DITKERNELS_FIND(cublasLtGetStatusString);
  DITKERNELS_FIND(cublasLtMatmul);
  DITKERNELS_FIND(cublasLtMatmulAlgoGetHeuristic);
  DITKERNELS_FIND(cublasLtMatmulDescCreate);
  DITKERNELS_FIND(cublasLtMatmulDescDestroy);
  DITKERNELS_FIND(cublasLtMatmulDescSetAttribute);
  DITKERNELS_FIND(cublasLtMatmulPreferenceCreate);
  DITKERNELS_FIND(cublasLtMatmulPreferenceDestroy);
  DITKERNELS_FIND(cublasLtMatmulPreferenceSetAttribute);
  DITKERNELS_FIND(cublasLtMatrixLayoutCreate);
  DITKERNELS_FIND(cublasLtMatrixLayoutDestroy);
  return found;
}
#undef DITKERNELS_FIND

const Blas& blas() {
  static const Blas found = find_blas();
  return found;
}

std::string cuda_blas() { return blas().missing; }

void require(cublasStatus_t status, const char* op, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, op, ": ", what, ": ", blas().cublasLtGetStatusString(status));
}

// One handle a device, for as long as the process lives.
cublasLtHandle_t handle_of(const char* op, int device) {
  static std::map<int, cublasLtHandle_t> handles;
  const auto known = handles.find(device);
  if (known != handles.end()) return known->second;
  cublasLtHandle_t made = nullptr;
  require(blas().cublasLtCreate(&made), op, "cublasLtCreate");
  return handles[device] = made;
}

// ---------------------------------------------------------------------------------------------------------------------
// What cuBLASLt is told
// ---------------------------------------------------------------------------------------------------------------------

struct Operation {
  cublasLtMatmulDesc_t it = nullptr;

  explicit Operation(const char* op) {
    require(blas().cublasLtMatmulDescCreate(&it, CUBLAS_COMPUTE_32F, CUDA_R_32F), op, "cublasLtMatmulDescCreate");
  }
  Operation(const Operation&) = delete;
  ~Operation() { blas().cublasLtMatmulDescDestroy(it); }

  template <typename Value>
  void set(const char* op, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
    require(blas().cublasLtMatmulDescSetAttribute(it, attribute, &value, sizeof(value)), op, "cublasLtMatmulDescSetAttribute");
  }
};

// As cuBLASLt sees it: column by column.
struct Layout {
  cublasLtMatrixLayout_t it = nullptr;

  Layout(const char* op, cudaDataType_t type, int64_t rows, int64_t columns) {
    require(blas().cublasLtMatrixLayoutCreate(&it, type, rows, columns, rows), op, "cublasLtMatrixLayoutCreate");
  }
  Layout(const Layout&) = delete;
  ~Layout() { blas().cublasLtMatrixLayoutDestroy(it); }
};

struct Preference {
  cublasLtMatmulPreference_t it = nullptr;

  explicit Preference(const char* op) {
    require(blas().cublasLtMatmulPreferenceCreate(&it), op, "cublasLtMatmulPreferenceCreate");
  }
  Preference(const Preference&) = delete;
  ~Preference() { blas().cublasLtMatmulPreferenceDestroy(it); }

  template <typename Value>
  void set(const char* op, cublasLtMatmulPreferenceAttributes_t attribute, const Value& value) {
    require(
        blas().cublasLtMatmulPreferenceSetAttribute(it, attribute, &value, sizeof(value)), op,
        "cublasLtMatmulPreferenceSetAttribute");
  }
};

uint32_t alignment(const void* data) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  uint64_t bytes = LARGEST_ALIGNMENT;
  while (address % bytes != 0) bytes /= 2;
  return static_cast<uint32_t>(bytes);
}

// out (M, F) = epilogue(left (M, K) · op(weight)): the weight is (F, K), transposed, or (K, F).
struct Product {
  const char* op;
  const Tensor &left, &weight, &out;
  bool transposed;
  cublasLtEpilogue_t epilogue;
  const Tensor *bias, *aux;  // null where the epilogue has none

  int64_t rows() const { return out.size(0); }
  int64_t columns() const { return out.size(1); }
  int64_t depth() const { return left.size(1); }
  cudaDataType_t type() const { return out.scalar_type() == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF; }
};

// Shape, dtype and alignments: with these the choice of an algorithm is made.
using Key = std::array<int64_t, 10>;

Key key_of(const Product& product, int device) {
  const auto of = [](const Tensor* tensor) { return tensor == nullptr ? int64_t{0} : int64_t{alignment(tensor->data_ptr())}; };
  return {
      device,
      product.rows(),
      product.columns(),
      product.depth() * 2 + product.transposed,
      product.type(),
      product.epilogue,
      of(&product.left),
      of(&product.weight),
      of(&product.out),
      of(product.bias) * 1024 + of(product.aux)};
}

void describe_epilogue(const Product& product, Operation& operation) {
  const char* op = product.op;
  operation.set(op, CUBLASLT_MATMUL_DESC_TRANSA, product.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
  operation.set(op, CUBLASLT_MATMUL_DESC_EPILOGUE, product.epilogue);
  if (product.bias != nullptr) operation.set(op, CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias->data_ptr());
  if (product.aux == nullptr) return;
  operation.set(op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, product.aux->data_ptr());
  operation.set(op, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, product.columns());
}

cublasLtMatmulHeuristicResult_t choose(
    const Product& product, cublasLtHandle_t handle, const Operation& operation, const Layout& a, const Layout& b,
    const Layout& d) {
  const char* op = product.op;
  Preference preference(op);
  preference.set(op, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, MOST_WORKSPACE);
  preference.set(
      op, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  preference.set(op, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(product.weight.data_ptr()));
  preference.set(op, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(product.left.data_ptr()));
  preference.set(op, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(product.out.data_ptr()));
  preference.set(op, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(product.out.data_ptr()));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  require(
      blas().cublasLtMatmulAlgoGetHeuristic(handle, operation.it, a.it, b.it, d.it, d.it, preference.it, 1, &found, &count), op,
      "cublasLtMatmulAlgoGetHeuristic");
  STD_TORCH_CHECK(
      count > 0, op, ": cuBLASLt has no algorithm for ", product.rows(), " x ", product.depth(), " times ", product.depth(),
      " x ", product.columns(), " with this epilogue");
  return found;
}

struct Choice {
  cublasLtHandle_t handle;
  cublasLtMatmulHeuristicResult_t found;
};

// Made once for a key: a handle and an algorithm serve every thread.
Choice choice_of(
    const Product& product, int device, const Operation& operation, const Layout& a, const Layout& b, const Layout& d) {
  static std::mutex one_at_a_time;
  static std::map<Key, cublasLtMatmulHeuristicResult_t> chosen;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const cublasLtHandle_t handle = handle_of(product.op, device);
  const Key key = key_of(product, device);
  const auto known = chosen.find(key);
  if (known != chosen.end()) return {handle, known->second};
  return {handle, chosen[key] = choose(product, handle, operation, a, b, d)};
}

void multiply(const Product& product) {
  const char* op = product.op;
  void* stream = nullptr;
  int device = 0;
#ifndef DITKERNELS_EMULATION
  device = product.out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0, op,
      ": torch gave no CUDA stream for device ", device);
#endif
  Operation operation(op);
  describe_epilogue(product, operation);
  const int64_t columns = product.columns(), depth = product.depth();
  const Layout a(op, product.type(), product.transposed ? depth : columns, product.transposed ? columns : depth);
  const Layout b(op, product.type(), depth, product.rows());
  const Layout d(op, product.type(), columns, product.rows());
  const auto [handle, found] = choice_of(product, device, operation, a, b, d);
  const Tensor workspace = empty(product.out, {static_cast<int64_t>(found.workspaceSize)}, ScalarType::Byte);
  const float one = 1.0f, zero = 0.0f;
  require(
      blas().cublasLtMatmul(
          handle, operation.it, &one, product.weight.data_ptr(), a.it, product.left.data_ptr(), b.it, &zero,
          product.out.data_ptr(), d.it, product.out.data_ptr(), d.it, &found.algo, workspace.data_ptr(), found.workspaceSize,
          static_cast<cudaStream_t>(stream)),
      op, "cublasLtMatmul");
}

// ---------------------------------------------------------------------------------------------------------------------
// The two halves
// ---------------------------------------------------------------------------------------------------------------------

void require_packed(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " has gaps");
  describe(name, tensor);
}

std::tuple<Tensor, Tensor> linear_gelu(Tensor x, Tensor weight, OptionalTensor bias, bool keep) {
  const char* op = "linear_gelu";
  const std::vector<int64_t> shape{x.size(0), weight.size(0)};
  const Tensor h = empty(x, shape, x.scalar_type());
  const Tensor z = keep ? empty(x, shape, x.scalar_type()) : nothing(x);
  if (h.numel() == 0) return {h, z};
  require_packed(op, "x", x);
  require_packed(op, "weight", weight);
  require_packed(op, "h", h);
  if (keep) require_packed(op, "z", z);
  if (bias.has_value()) require_packed(op, "bias", *bias);
  const cublasLtEpilogue_t kept[] = {CUBLASLT_EPILOGUE_GELU_AUX, CUBLASLT_EPILOGUE_GELU_AUX_BIAS};
  const cublasLtEpilogue_t bare[] = {CUBLASLT_EPILOGUE_GELU, CUBLASLT_EPILOGUE_GELU_BIAS};
  multiply(
      {op, x, weight, h, true, (keep ? kept : bare)[bias.has_value()], bias.has_value() ? &*bias : nullptr, keep ? &z : nullptr});
  return {h, z};
}

std::tuple<Tensor, Tensor> gelu_linear_backward(Tensor dy, Tensor weight, Tensor z, bool biased) {
  const char* op = "gelu_linear_backward";
  const Tensor dz = empty_like(z, z);
  if (dz.numel() == 0) return {dz, torch::stable::new_zeros(z, {biased ? z.size(1) : 0})};
  const Tensor dbias = biased ? empty(z, {z.size(1)}, z.scalar_type()) : nothing(z);
  require_packed(op, "dy", dy);
  require_packed(op, "weight", weight);
  require_packed(op, "z", z);
  require_packed(op, "dz", dz);
  if (biased) require_packed(op, "dbias", dbias);
  multiply(
      {op, dy, weight, dz, false, biased ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU, biased ? &dbias : nullptr,
       &z});
  return {dz, dbias};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("linear_gelu_cuda", TORCH_BOX(&ditkernels::linear_gelu));
  library.impl("gelu_linear_backward_cuda", TORCH_BOX(&ditkernels::gelu_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_blas", TORCH_BOX(&ditkernels::cuda_blas));
}

#endif
