// The two halves of `mlp` around its hidden layer: cuBLASLt's matrix products with GELU, and with its gradient, as epilogues.
// Formulas and names are those at the top of ditkernels/ops/mlp/__init__.py. All matrices are contiguous and row-major.
//
//   linear_gelu            h (M, F) = GELU(z), z = x (M, D) · weightᵀ (F, D) + bias. It reads x and the weight, and writes h and,
//                          if `keep` is set, z in x's dtype. GELU is applied to the fp32 sums, before z is rounded.
//   gelu_linear_backward   dz (M, F) = (dy (M, E) · weight (E, F)) ⊙ GELU'(z), dbias = sum of dz over rows. It reads dy, the weight
//                          and z, and writes dz and dbias. The gradient of h is never written.
//   mlp_algorithms         whether cuBLASLt has algorithms for both at these sizes on the current device; `mlp` asks first.
//
// cuBLASLt's GELU is the tanh form. cuBLASLt takes matrices column-major, and so sees the transpose of each of ours: it computes
// outᵀ = op(weight) · leftᵀ, of shape (F, M). Its epilogues add the bias to each column of outᵀ and sum over its columns.
//
// cuBLASLt is opened at its first use, by a file name for which the loader returns the copy that torch has loaded. So this library
// also loads with a torch that has none. The algorithm is cuBLASLt's first choice for the sizes and alignments of the tensors, and
// is kept. Partial sums over the inner dimension are fp32. The same inputs, aligned alike, give the same bits on one kind of GPU.
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
#include <memory>
#include <mutex>

namespace ditkernels {
namespace {

constexpr uint64_t MOST_WORKSPACE = 32 << 20;
constexpr uint64_t LEAST_ALIGNMENT = 16;  // an operand with less is copied
// cuBLASLt assumes 256 bytes by default. On a GPU, torch aligns allocations to 512; the emulation's are aligned to 64.
#ifndef DITKERNELS_EMULATION
constexpr uint64_t LARGEST_ALIGNMENT = 256;
#else
constexpr uint64_t LARGEST_ALIGNMENT = 64;
#endif

// ---- The library ----------------------------------------------------------------------------------------------------

#define DITKERNELS_EACH(DO)                \
  DO(cublasLtCreate)                       \
  DO(cublasLtGetStatusString)              \
  DO(cublasLtMatmul)                       \
  DO(cublasLtMatmulAlgoGetHeuristic)       \
  DO(cublasLtMatmulDescCreate)             \
  DO(cublasLtMatmulDescDestroy)            \
  DO(cublasLtMatmulDescSetAttribute)       \
  DO(cublasLtMatmulPreferenceCreate)       \
  DO(cublasLtMatmulPreferenceDestroy)      \
  DO(cublasLtMatmulPreferenceSetAttribute) \
  DO(cublasLtMatrixLayoutCreate)           \
  DO(cublasLtMatrixLayoutDestroy)

struct Blas {
  std::string missing;  // why cuBLASLt cannot be used, or ""
#define DITKERNELS_MEMBER(name) decltype(&::name) name;
  DITKERNELS_EACH(DITKERNELS_MEMBER)
};

#ifndef DITKERNELS_EMULATION
#define DITKERNELS_TEXT_OF(value) #value
#define DITKERNELS_TEXT(value) DITKERNELS_TEXT_OF(value)
constexpr const char* LIBRARY = "libcublasLt.so." DITKERNELS_TEXT(CUBLAS_VER_MAJOR);

Blas find_blas() {
  Blas found{};
  void* library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    found.missing = std::string(LIBRARY) + ", which the library was built for, is not to be found";
    return found;
  }
#define DITKERNELS_FIND(name)                                              \
  found.name = reinterpret_cast<decltype(&::name)>(dlsym(library, #name)); \
  if (found.name == nullptr) found.missing = std::string(LIBRARY) + " has no " #name;
  DITKERNELS_EACH(DITKERNELS_FIND)
  return found;
}
#else
#define DITKERNELS_OWN(name) .name = &::name,
Blas find_blas() { return {.missing = "", DITKERNELS_EACH(DITKERNELS_OWN)}; }
#endif

const Blas& blas() {
  static const Blas found = find_blas();
  return found;
}

std::string cuda_blas() { return blas().missing; }

void require(cublasStatus_t status, const char* op, const char* what) {
  STD_TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, op, ": ", what, ": ", blas().cublasLtGetStatusString(status));
}

// Each device has one handle, which is never destroyed.
cublasLtHandle_t handle_of(const char* op, int device) {
  static std::map<int, cublasLtHandle_t> handles;
  const auto known = handles.find(device);
  if (known != handles.end()) return known->second;
  cublasLtHandle_t made = nullptr;
  require(blas().cublasLtCreate(&made), op, "cublasLtCreate");
  return handles[device] = made;
}

// ---- What cuBLASLt is told ------------------------------------------------------------------------------------------

// A descriptor that is destroyed with its owner.
template <typename Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, cublasStatus_t (*)(Handle)>;
using Operation = Owned<cublasLtMatmulDesc_t>;
using Layout = Owned<cublasLtMatrixLayout_t>;
using Preference = Owned<cublasLtMatmulPreference_t>;

Operation make_operation(const char* op) {
  cublasLtMatmulDesc_t made = nullptr;
  require(blas().cublasLtMatmulDescCreate(&made, CUBLAS_COMPUTE_32F, CUDA_R_32F), op, "cublasLtMatmulDescCreate");
  return {made, blas().cublasLtMatmulDescDestroy};
}

// `rows` and `columns` are those that cuBLASLt sees, in column-major order.
Layout make_layout(const char* op, cudaDataType_t type, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  require(blas().cublasLtMatrixLayoutCreate(&made, type, rows, columns, rows), op, "cublasLtMatrixLayoutCreate");
  return {made, blas().cublasLtMatrixLayoutDestroy};
}

Preference make_preference(const char* op) {
  cublasLtMatmulPreference_t made = nullptr;
  require(blas().cublasLtMatmulPreferenceCreate(&made), op, "cublasLtMatmulPreferenceCreate");
  return {made, blas().cublasLtMatmulPreferenceDestroy};
}

template <typename Value>
void set(const char* op, const Operation& of, cublasLtMatmulDescAttributes_t attribute, const Value& value) {
  const auto status = blas().cublasLtMatmulDescSetAttribute(of.get(), attribute, &value, sizeof(value));
  require(status, op, "cublasLtMatmulDescSetAttribute");
}

template <typename Value>
void set(const char* op, const Preference& of, cublasLtMatmulPreferenceAttributes_t attribute, const Value& value) {
  const auto status = blas().cublasLtMatmulPreferenceSetAttribute(of.get(), attribute, &value, sizeof(value));
  require(status, op, "cublasLtMatmulPreferenceSetAttribute");
}

uint32_t alignment(const void* data) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data);
  uint64_t bytes = LARGEST_ALIGNMENT;
  while (address % bytes != 0) bytes /= 2;
  return static_cast<uint32_t>(bytes);
}

// out (M, F) = epilogue(left (M, K) · op(weight)). The weight is (F, K) if `transposed` is set, else (K, F).
struct Product {
  const char* op;
  int64_t rows, columns, depth;
  cudaDataType_t type;
  bool transposed;
  cublasLtEpilogue_t epilogue;
  void *left, *weight, *out;
  void *bias, *aux;  // null where the epilogue has none
};

// Device, sizes, dtype, epilogue and alignments: all that the choice of an algorithm depends on.
using Key = std::array<int64_t, 10>;

Key key_of(const Product& product, int device) {
  const auto of = [](const void* data) { return data == nullptr ? int64_t{0} : int64_t{alignment(data)}; };
  return {device,           product.rows,
          product.columns,  product.depth * 2 + product.transposed,
          product.type,     product.epilogue,
          of(product.left), of(product.weight),
          of(product.out),  of(product.bias) * 1024 + of(product.aux)};
}

// The product as cuBLASLt's descriptors. cuBLASLt's operand a is the weight, b is `left`, d is `out`.
struct Described {
  Operation operation;
  Layout a, b, d;

  explicit Described(const Product& p)
      : operation(make_operation(p.op)),
        a(make_layout(p.op, p.type, p.transposed ? p.depth : p.columns, p.transposed ? p.columns : p.depth)),
        b(make_layout(p.op, p.type, p.depth, p.rows)),
        d(make_layout(p.op, p.type, p.columns, p.rows)) {
    set(p.op, operation, CUBLASLT_MATMUL_DESC_TRANSA, p.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(p.op, operation, CUBLASLT_MATMUL_DESC_EPILOGUE, p.epilogue);
    if (p.bias != nullptr) set(p.op, operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
    if (p.aux == nullptr) return;
    set(p.op, operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, p.aux);
    set(p.op, operation, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.columns);
  }
};

using Found = std::optional<cublasLtMatmulHeuristicResult_t>;

Found ask(const Product& product, cublasLtHandle_t handle, const Described& described) {
  const char* op = product.op;
  const Preference preference = make_preference(op);
  set(op, preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, MOST_WORKSPACE);
  set(op, preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  set(op, preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(product.weight));
  set(op, preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(product.left));
  set(op, preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(product.out));
  set(op, preference, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(product.out));
  cublasLtMatmulHeuristicResult_t found{};
  int count = 0;
  const cublasStatus_t status = blas().cublasLtMatmulAlgoGetHeuristic(
      handle, described.operation.get(), described.a.get(), described.b.get(), described.d.get(), described.d.get(),
      preference.get(), 1, &found, &count);
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || (status == CUBLAS_STATUS_SUCCESS && count == 0)) return std::nullopt;
  require(status, op, "cublasLtMatmulAlgoGetHeuristic");
  return found;
}

struct Choice {
  cublasLtHandle_t handle;
  Found found;
};

// Asks cuBLASLt once for each key, under a lock: all threads share the handles and the choices.
Choice choice_of(const Product& product, int device, const Described& described) {
  static std::mutex one_at_a_time;
  static std::map<Key, Found> chosen;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const cublasLtHandle_t handle = handle_of(product.op, device);
  const Key key = key_of(product, device);
  const auto known = chosen.find(key);
  if (known != chosen.end()) return {handle, known->second};
  return {handle, chosen[key] = ask(product, handle, described)};
}

std::string no_algorithm(const Product& product) {
  const auto size = [](int64_t rows, int64_t columns) { return std::to_string(rows) + " x " + std::to_string(columns); };
  return "cuBLASLt has no algorithm for " + size(product.rows, product.depth) + " times " + size(product.depth, product.columns) +
         " with the epilogue of " + product.op;
}

void multiply(const Product& product, const Tensor& out) {
  const char* op = product.op;
  void* stream = nullptr;
  int device = 0;
#ifndef DITKERNELS_EMULATION
  device = out.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream != nullptr && aoti_torch_get_current_cuda_stream(device, &stream) == 0, op,
      ": torch gave no CUDA stream for device ", device);
#endif
  const Described described(product);
  const auto [handle, found] = choice_of(product, device, described);
  STD_TORCH_CHECK(found.has_value(), no_algorithm(product));
  const Tensor workspace = empty(out, {static_cast<int64_t>(found->workspaceSize)}, ScalarType::Byte);
  const float one = 1.0f, zero = 0.0f;
  require(
      blas().cublasLtMatmul(
          handle, described.operation.get(), &one, product.weight, described.a.get(), product.left, described.b.get(), &zero,
          product.out, described.d.get(), product.out, described.d.get(), &found->algo, workspace.data_ptr(), found->workspaceSize,
          static_cast<cudaStream_t>(stream)),
      op, "cublasLtMatmul");
}

// ---- The two halves -------------------------------------------------------------------------------------------------

cudaDataType_t type_of(ScalarType dtype) { return dtype == ScalarType::Half ? CUDA_R_16F : CUDA_R_16BF; }

// The operand itself, or an aligned copy of it. It must be contiguous.
Tensor operand(const char* op, const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), op, ": ", name, " has gaps");
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % LEAST_ALIGNMENT == 0;
  const Tensor taken = aligned ? tensor : torch::stable::clone(tensor);
  describe(name, taken);
  return taken;
}

OptionalTensor operand(const char* op, const char* name, const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(operand(op, name, *tensor)) : std::nullopt;
}

void* address(const OptionalTensor& tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

cublasLtEpilogue_t forward_epilogue(bool keep, bool biased) {
  if (keep) return biased ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
  return biased ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
}

cublasLtEpilogue_t backward_epilogue(bool biased) { return biased ? CUBLASLT_EPILOGUE_DGELU_BGRAD : CUBLASLT_EPILOGUE_DGELU; }

std::tuple<Tensor, Tensor> linear_gelu(Tensor x, Tensor weight, OptionalTensor bias, bool keep) {
  const char* op = "linear_gelu";
  const int64_t rows = x.size(0), columns = weight.size(0);
  const Tensor h = empty(x, {rows, columns}, x.scalar_type());
  OptionalTensor z;
  if (keep) z = empty(x, {rows, columns}, x.scalar_type());
  if (h.numel() == 0) return {h, or_nothing(z, x)};
  x = operand(op, "x", x), weight = operand(op, "weight", weight), bias = operand(op, "bias", bias);
  operand(op, "h", h), operand(op, "z", z);
  multiply(
      {op, rows, columns, x.size(1), type_of(x.scalar_type()), true, forward_epilogue(keep, bias.has_value()), x.data_ptr(),
       weight.data_ptr(), h.data_ptr(), address(bias), address(z)},
      h);
  return {h, or_nothing(z, x)};
}

std::tuple<Tensor, Tensor> gelu_linear_backward(Tensor dy, Tensor weight, Tensor z, bool biased) {
  const char* op = "gelu_linear_backward";
  const Tensor dz = empty(z, shape_of(z), z.scalar_type());
  if (dz.numel() == 0) return {dz, torch::stable::new_zeros(z, {biased ? z.size(1) : 0})};
  OptionalTensor dbias;
  if (biased) dbias = empty(z, {z.size(1)}, z.scalar_type());
  dy = operand(op, "dy", dy), weight = operand(op, "weight", weight), z = operand(op, "z", z);
  operand(op, "dz", dz), operand(op, "dbias", dbias);
  multiply(
      {op, dz.size(0), dz.size(1), dy.size(1), type_of(z.scalar_type()), false, backward_epilogue(biased), dy.data_ptr(),
       weight.data_ptr(), dz.data_ptr(), address(dbias), z.data_ptr()},
      dz);
  return {dz, or_nothing(dbias, z)};
}

// Returns "" if cuBLASLt has an algorithm for both products of x (rows, width) and weights (hidden, width) and (out, hidden), else
// the reason. It asks with the least alignment that operands have, since an algorithm for it also serves better aligned operands.
std::string mlp_algorithms(ScalarType dtype, int64_t rows, int64_t width, int64_t hidden, int64_t out) {
  if (!blas().missing.empty() || rows == 0) return blas().missing;
  int device = 0;
#ifndef DITKERNELS_EMULATION
  STD_TORCH_CHECK(cudaGetDevice(&device) == cudaSuccess, "mlp_algorithms: there is no current device");
#endif
  // The heuristic looks at alignments only and does not dereference this address.
  void* const place = reinterpret_cast<void*>(LEAST_ALIGNMENT);
  const auto lacks = [&](const Product& product) { return !choice_of(product, device, Described(product)).found.has_value(); };
  for (bool biased : {true, false}) {
    void* const bias = biased ? place : nullptr;
    for (bool keep : {true, false}) {
      const Product forward{"linear_gelu", rows,  hidden, width, type_of(dtype),        true, forward_epilogue(keep, biased),
                            place,         place, place,  bias,  keep ? place : nullptr};
      if (lacks(forward)) return no_algorithm(forward);
    }
    const Product backward{"gelu_linear_backward",    rows,  hidden, out,   type_of(dtype), false,
                           backward_epilogue(biased), place, place,  place, bias,           place};
    if (lacks(backward)) return no_algorithm(backward);
  }
  return "";
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("linear_gelu_cuda", TORCH_BOX(&ditkernels::linear_gelu));
  library.impl("gelu_linear_backward_cuda", TORCH_BOX(&ditkernels::gelu_linear_backward));
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CompositeExplicitAutograd, library) {
  library.impl("cuda_blas", TORCH_BOX(&ditkernels::cuda_blas));
  library.impl("mlp_algorithms_cuda", TORCH_BOX(&ditkernels::mlp_algorithms));
}

#endif
