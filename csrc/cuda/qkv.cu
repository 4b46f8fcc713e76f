// The CUDA kernel of `split_qkv`'s backward. Formulas and names are those at the top of ditkernels/ops/qkv/__init__.py.
//
//   stack_rows   A block owns the same sixteen units of eight channels of dq, dk and dv in one chunk of the rows of one sample and
//                walks through it; each half of a warp takes rows of its own. It reads them and writes dpacked: 2 passes over
//                (B, N, parts * D), with D = heads * head_dim. It also sums what it reads in fp32: each thread over its rows, then
//                the halves of each warp by a shuffle, then the warps through shared memory. It writes partial sums
//                (B * chunks, parts * D), fp32; add_groups (in sums.cuh) adds them: dbias.
//
// Sixteen units, 128 channels, divide the paper's widths. The kernel reads each of dq, dk and dv in place at its own strides. No
// unit spans two heads. Adjacent heads are merged into one long head, and adjacent samples into one long sample. The same inputs
// give the same bits: nothing is added atomically, and the number of chunks depends on shapes and strides alone.
#include "common.cuh"
#include "sums.cuh"

namespace ditkernels {
namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
constexpr int UNITS = 16;
constexpr int AT_ONCE = THREADS / UNITS;
constexpr int ROWS = 2;
constexpr int64_t BLOCKS = 4096;
constexpr int64_t SHORTEST_CHUNK = 64;
constexpr int SUMS_OF_A_PART = UNIT * UNITS;
constexpr int BYTES_OF_A_PART = WARPS * SUMS_OF_A_PART * sizeof(float);

// The channels of a token of dq, dk or dv are those of its first head; `*_apart` is the stride between heads, in elements.
template <typename T>
struct Stack {
  Tokens<T> dq, dk, dv;
  int64_t dq_apart, dk_apart, dv_apart;
  Tokens<T> dpacked;
  Tokens<float> partial;
  int64_t length, chunks, chunk_rows;
  int heads, head_dim, units, column_blocks;
};

template <typename T>
__device__ __forceinline__ Tokens<T> shifted(Tokens<T> tensor, int64_t elements) {
  if constexpr (std::is_same_v<T, Any>) {
    const int64_t bytes = tensor.dtype == ScalarType::Float ? sizeof(float) : sizeof(Half);
    tensor.data = static_cast<char*>(tensor.data) + elements * bytes;
  } else {
    tensor.data += elements;
  }
  return tensor;
}

template <typename T, int PARTS, bool VECTORISED>
__global__ void __launch_bounds__(THREADS) stack_rows(const Stack<T> a) {
  const int unit = static_cast<int>(blockIdx.x % a.column_blocks) * UNITS + threadIdx.x % UNITS;
  const int head = unit / a.units, column = unit % a.units * UNIT;
  const bool inside = head < a.heads;
  const int64_t chunk = blockIdx.x / a.column_blocks;
  const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;
  const int rows = static_cast<int>(first + a.chunk_rows < a.length ? a.chunk_rows : a.length - first);
  const int count = inside ? rows : 0;
  const int width = a.heads * a.head_dim, to = head * a.head_dim + column, end = (head + 1) * a.head_dim;
  // In the order of packing; the first is empty where there is no dq.
  Tokens<T> from[3] = {{}, shifted(a.dk, inside ? head * a.dk_apart : 0), shifted(a.dv, inside ? head * a.dv_apart : 0)};
  if constexpr (PARTS == 3) from[0] = shifted(a.dq, inside ? head * a.dq_apart : 0);
  Unit total[PARTS] = {};
  UNROLL_BY(1) for (int start = threadIdx.x / UNITS; start < count; start += ROWS * AT_ONCE) {
    Unit held[ROWS][PARTS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
      if (start + r * AT_ONCE >= count) continue;
      UNROLL for (int p = 0; p < PARTS; ++p) {
        held[r][p] = load<VECTORISED>(from[3 - PARTS + p], sample, first + start + r * AT_ONCE, column, a.head_dim);
      }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
      if (start + r * AT_ONCE >= count) continue;
      UNROLL for (int p = 0; p < PARTS; ++p) {
        store<VECTORISED>(a.dpacked, sample, first + start + r * AT_ONCE, p * width + to, p * width + end, held[r][p]);
        UNROLL for (int i = 0; i < UNIT; ++i) total[p].at[i] += held[r][p].at[i];
      }
    }
  }
  const Shared<float> sums{0};
  const int mine = threadIdx.x % UNITS;
  UNROLL for (int p = 0; p < PARTS; ++p) UNROLL for (int i = 0; i < UNIT; ++i) {
    const float both = total[p].at[i] + __shfl_xor_sync(EVERY_LANE, total[p].at[i], UNITS);
    const int part = threadIdx.x / WARP * PARTS + p;
    if (threadIdx.x % WARP < UNITS) sums.write(part * SUMS_OF_A_PART + i * UNITS + mine, both);
  }
  __syncthreads();
  // Each thread adds one of the eight channels of its unit, in each part.
  const int channel = threadIdx.x / UNITS;
  if (!inside || column + channel >= a.head_dim) return;
  UNROLL for (int p = 0; p < PARTS; ++p) {
    float sum = 0.0f;
    UNROLL for (int warp = 0; warp < WARPS; ++warp) {
      sum += sums.read((warp * PARTS + p) * SUMS_OF_A_PART + channel * UNITS + mine);
    }
    store_one(a.partial, 0, chunk, p * width + to + channel, sum);
  }
}

// ---- Launch ---------------------------------------------------------------------------------------------------------

struct Shape {
  int64_t batch, length, heads, head_dim;
};

// The shape of every part, with heads and samples merged where in all parts they are adjacent in memory.
Shape joined(const OptionalTensor& dq, const Tensor& dk, const Tensor& dv) {
  Shape shape = {dk.size(0), dk.size(1), dk.size(2), dk.size(3)};
  bool heads = true, samples = true;
  for (const OptionalTensor& t : {dq, OptionalTensor(dk), OptionalTensor(dv)}) {
    if (!t.has_value()) continue;
    heads = heads && (shape.heads == 1 || t->stride(2) == shape.head_dim * t->stride(3));
    samples = samples && t->stride(0) == shape.length * t->stride(1);
  }
  if (heads) shape = {shape.batch, shape.length, 1, shape.heads * shape.head_dim};
  if (samples) shape = {1, shape.batch * shape.length, shape.heads, shape.head_dim};
  return shape;
}

// Whether vectorised accesses can move every unit of every head.
bool heads_are_vectorised(const OptionalTensor& tensor, const Shape& shape) {
  if (!tensor.has_value()) return true;
  const int64_t bytes = tensor->element_size();
  const int64_t sizes[] = {shape.batch, shape.length, shape.heads};
  if (shape.head_dim % UNIT != 0 || tensor->stride(3) != 1 || reinterpret_cast<uintptr_t>(tensor->data_ptr()) % 16 != 0)
    return false;
  for (int i = 0; i < 3; ++i)
    if (sizes[i] > 1 && tensor->stride(i) * bytes % 16 != 0) return false;
  return true;
}

template <typename T>
Tokens<T> heads_of(const char* name, const OptionalTensor& tensor) {
  Tokens<T> made = tokens<T>(name, tensor);
  if (tensor.has_value()) made.token = tensor->stride(1);
  return made;
}

std::tuple<Tensor, Tensor> split_qkv_backward(OptionalTensor dq, Tensor dk, Tensor dv, ScalarType dtype) {
  const char* op = "split_qkv_backward";
  const int64_t parts = dq.has_value() ? 3 : 2;
  const Tensor dpacked = empty(dk, {dk.size(0), dk.size(1), parts, dk.size(2), dk.size(3)}, dk.scalar_type());
  const Shape shape = joined(dq, dk, dv);
  const int64_t width = parts * shape.heads * shape.head_dim, units = ceil_div(shape.head_dim, UNIT);
  const int64_t column_blocks = ceil_div(shape.heads * units, UNITS);
  const Chunks chunks = cut(shape.length, shape.batch * column_blocks, BLOCKS, SHORTEST_CHUNK, ROWS * AT_ONCE);
  const Tensor partial = empty(dk, {shape.batch * chunks.count, width}, ScalarType::Float);
  const auto run = [&](auto type, auto vectorised) {
    using T = decltype(type);
    Tokens<T> rows = tokens<T>("dpacked", dpacked);
    rows.sample = shape.length * width;
    rows.token = width;
    const Stack<T> a{
        .dq = heads_of<T>("dq", dq),
        .dk = heads_of<T>("dk", dk),
        .dv = heads_of<T>("dv", dv),
        .dq_apart = dq.has_value() ? dq->stride(2) : 0,
        .dk_apart = dk.stride(2),
        .dv_apart = dv.stride(2),
        .dpacked = rows,
        .partial = matrix<float>("partial", partial),
        .length = shape.length,
        .chunks = chunks.count,
        .chunk_rows = chunks.rows,
        .heads = static_cast<int>(shape.heads),
        .head_dim = static_cast<int>(shape.head_dim),
        .units = static_cast<int>(units),
        .column_blocks = static_cast<int>(column_blocks)};
    const int64_t blocks = shape.batch * chunks.count * column_blocks;
    if (parts == 3)
      launch<stack_rows<T, 3, vectorised>, THREADS, 3 * BYTES_OF_A_PART>(op, blocks, dk, a);
    else
      launch<stack_rows<T, 2, vectorised>, THREADS, 2 * BYTES_OF_A_PART>(op, blocks, dk, a);
  };
  if (heads_are_vectorised(dq, shape) && heads_are_vectorised(dk, shape) && heads_are_vectorised(dv, shape))
    by_dtype(dk.scalar_type(), [&](auto type) { run(type, std::true_type{}); });
  else
    run(Any{}, std::false_type{});
  const Tensor dbias = empty(dk, {width}, dtype);
  sum_groups(op, "dbias", partial, dbias);
  return {dpacked, dbias};
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, DITKERNELS_DEVICE, library) {
  library.impl("split_qkv_backward_cuda", TORCH_BOX(&ditkernels::split_qkv_backward));
}
