// What the tests ask of the emulation: its switches and counters, and kernels with one fault each.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common.cuh"
#include "cublaslt.h"

namespace ditkernels {
namespace {

struct Place {
  Tokens<float> to;
};

const Shared<float> scratch{0};

void beyond_the_end(const Place a) { store_one(a.to, 0, 0, threadIdx.x + 1, 1.0f); }

void before_the_start(const Place a) { load_one(a.to, 0, 0, static_cast<int>(threadIdx.x) - 1); }

void misaligned(const Place a) { load_words(a.to, 0, 0, 1); }

void barrier_for_some(const Place) {
  if (threadIdx.x < 32) __syncthreads();
}

void shuffle_without_a_lane(const Place a) {
  if (threadIdx.x == 5) return;
  store_one(a.to, 0, 0, threadIdx.x, warp_sum(1.0f));
}

void shuffle_of_half_a_warp(const Place) { __shfl_xor_sync(0xffff, 1.0f, 1); }

void shared_memory_unwritten(const Place a) {
  if (threadIdx.x != 3) scratch.write(threadIdx.x, 1.0f);
  __syncthreads();
  store_one(a.to, 0, 0, threadIdx.x, scratch.read(threadIdx.x));
}

void shared_memory_beyond_the_launch(const Place) { scratch.write(threadIdx.x + 1, 1.0f); }

void read_before_the_barrier(const Place a) {
  scratch.write(threadIdx.x, 1.0f);
  store_one(a.to, 0, 0, threadIdx.x, scratch.read(threadIdx.x ^ 1));
}

void written_before_all_have_read(const Place a) {
  scratch.write(threadIdx.x, 1.0f);
  __syncthreads();
  store_one(a.to, 0, 0, threadIdx.x, scratch.read(63 - threadIdx.x));
  scratch.write(threadIdx.x, 2.0f);
}

void blocks_that_overlap(const Place a) { store_one(a.to, 0, 0, threadIdx.x, blockIdx.x); }

void sound(const Place a) {
  scratch.write(threadIdx.x, 1.0f);
  __syncthreads();
  const float other = scratch.read(63 - threadIdx.x);
  __syncthreads();
  scratch.write(threadIdx.x, other);
  __syncwarp();
  store_one(a.to, 0, 0, threadIdx.x, warp_sum(scratch.read(threadIdx.x ^ 1)));
}

const std::map<std::string, void (*)(Place)> FAULTY{
    {"beyond_the_end", beyond_the_end},
    {"before_the_start", before_the_start},
    {"misaligned", misaligned},
    {"barrier_for_some", barrier_for_some},
    {"shuffle_without_a_lane", shuffle_without_a_lane},
    {"shuffle_of_half_a_warp", shuffle_of_half_a_warp},
    {"shared_memory_unwritten", shared_memory_unwritten},
    {"shared_memory_beyond_the_launch", shared_memory_beyond_the_launch},
    {"read_before_the_barrier", read_before_the_barrier},
    {"written_before_all_have_read", written_before_all_have_read},
    {"blocks_that_overlap", blocks_that_overlap},
    {"sound", sound}};

// Runs a kernel of 64 threads over 64 floats; the fault it ends with, or "".
std::string fault_of(const std::string& kernel) {
  alignas(16) static float memory[64];
  Place place;
  place.to.data = memory;
  place.to.channel = 1;
  place.to.id = emulation::describe("memory", memory, sizeof(memory));
  const int blocks = kernel == "blocks_that_overlap" ? 2 : 1;
  try {
    emulation::launch(kernel, blocks, 64, 64 * sizeof(float), [&] { FAULTY.at(kernel)(place); });
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

void reset(bool tracing, int order, bool last_block_only, std::function<std::vector<int64_t>(const std::string&, int64_t)> sample) {
  emulation::counts.clear();
  emulation::sampled.clear();
  emulation::ranges.clear();
  emulation::tracing = tracing;
  emulation::order = order;
  emulation::last_block_only = last_block_only;
  emulation::sample = sample;
}

using Histogram = std::map<uint32_t, int64_t>;

Histogram histogram(const std::vector<uint32_t>& touched) {
  Histogram found;
  for (uint32_t times : touched) ++found[times];
  return found;
}

// By kernel and tensor: elements read and written, and while tracing how many elements were read, and written, so many times.
auto counts() {
  std::map<std::pair<std::string, std::string>, std::tuple<int64_t, int64_t, Histogram, Histogram>> all;
  for (const auto& [key, count] : emulation::counts)
    all[key] = {count.read, count.written, histogram(count.reads), histogram(count.writes)};
  return all;
}

using Bytes = std::map<std::string, std::pair<int64_t, int64_t>>;

// Of every launch while sampling: kernel, blocks, threads, bytes of shared memory, and by sampled block and tensor the bytes read and
// written.
std::vector<std::tuple<std::string, int64_t, int, int64_t, std::vector<Bytes>>> sampled() {
  std::vector<std::tuple<std::string, int64_t, int, int64_t, std::vector<Bytes>>> all;
  for (const emulation::Launched& launched : emulation::sampled) {
    std::vector<Bytes> blocks;
    for (const auto& traffic : launched.traffic) {
      blocks.emplace_back();
      for (const auto& [name, bytes] : traffic) blocks.back()[name] = {bytes.read, bytes.written};
    }
    all.emplace_back(launched.kernel, launched.blocks, launched.threads, launched.shared, blocks);
  }
  return all;
}

std::vector<std::tuple<std::string, int, int>> registered() {
  std::vector<std::tuple<std::string, int, int>> all;
  for (const Kernel& kernel : kernels()) all.emplace_back(kernel.name, kernel.threads, kernel.shared);
  return all;
}

}  // namespace
}  // namespace ditkernels

PYBIND11_MODULE(ditkernels_emulation, module) {
  module.def("fault_of", &ditkernels::fault_of);
  module.def("reset", &ditkernels::reset);
  module.def("counts", &ditkernels::counts);
  module.def("sampled", &ditkernels::sampled);
  module.def("registered", &ditkernels::registered);
  module.def("descriptors", [] { return emulation::descriptors; });
  module.def("fill_memory", [](bool full) { emulation::memory_is_full = full; });
  module.def("lack_algorithms", [](int epilogue, bool as_status) {
    emulation::without_algorithm = epilogue;
    emulation::lack_is_a_status = as_status;
  });
  module.def("mutate", [](int mutant) { emulation::mutant = mutant; });
}
