// What the tests ask of the emulation: its counters, and kernels with one fault each.
#include "common.cuh"

namespace ditkernels {
namespace {

struct Place {
  Tokens<float> to;
};

__global__ void beyond_the_end(const Place a) { store_one(a.to, 0, 0, threadIdx.x + 1, 1.0f); }

__global__ void barrier_for_some(const Place) {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void shuffle_without_a_lane(const Place a) {
  if (threadIdx.x == 5) return;
  store_one(a.to, 0, 0, threadIdx.x, warp_sum(1.0f));
}

__global__ void shared_memory_unwritten(const Place a) {
  DITKERNELS_SHARED(float, scratch, 64);
  if (threadIdx.x != 3) scratch.write(threadIdx.x, 1.0f);
  __syncthreads();
  store_one(a.to, 0, 0, threadIdx.x, scratch.read(threadIdx.x));
}

__global__ void sound(const Place a) {
  DITKERNELS_SHARED(float, scratch, 64);
  scratch.write(threadIdx.x, 1.0f);
  __syncthreads();
  store_one(a.to, 0, 0, threadIdx.x, warp_sum(scratch.read(63 - threadIdx.x)));
}

}  // namespace
}  // namespace ditkernels

// Runs a kernel of 64 threads over 64 floats; the fault it ends with, or "".
extern "C" const char* emulation_run(const char* kernel) {
  using namespace ditkernels;
  static std::string answer;
  const std::map<std::string, void (*)(Place)> kernels{{"beyond_the_end", beyond_the_end},
                                                       {"barrier_for_some", barrier_for_some},
                                                       {"shuffle_without_a_lane", shuffle_without_a_lane},
                                                       {"shared_memory_unwritten", shared_memory_unwritten},
                                                       {"sound", sound}};
  std::vector<float> memory(64);
  const Place place{{memory.data(), 0, 0, 1, emulation::describe("memory", memory.data(), 64 * sizeof(float))}};
  const auto run = kernels.at(kernel);
  answer.clear();
  try {
    emulation::launch(kernel, 1, 64, [&] { run(place); });
  } catch (const std::runtime_error& error) {
    answer = error.what();
  }
  return answer.c_str();
}

extern "C" void emulation_reset() {
  emulation::counts.clear();
  emulation::ranges.clear();
}

// One line a tensor: name, elements read, elements written since the last reset.
extern "C" const char* emulation_counts() {
  static std::string answer;
  answer.clear();
  for (const auto& [name, count] : emulation::counts)
    answer += name + " " + std::to_string(count.read) + " " + std::to_string(count.written) + "\n";
  return answer.c_str();
}
