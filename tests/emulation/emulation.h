// Runs CUDA sources on the host, for tests: every thread of a block is a fiber, blocks and threads run in permuted order.
//
// A kernel that reaches outside a tensor, a barrier that some threads never reach, a shuffle with missing lanes and a read of
// shared memory that nobody wrote end the launch with an error that names the kernel. Accesses are counted by tensor.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DITKERNELS_DEVICE CPU

namespace emulation {

struct Dim {
  int x = 0;
};

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Range {
  std::string name;
  const char* data;
  int64_t bytes;
};

struct Count {
  int64_t read = 0, written = 0;
};

enum class State { ready, barrier, shuffle, done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  unsigned mask = 0;
  float value = 0.0f;
};

constexpr size_t STACK = 128 * 1024;

inline std::deque<Range> ranges;
inline std::map<std::string, Count> counts;
inline std::vector<Fiber> fibers(1024);
inline std::vector<char> memory, written;
inline ucontext_t scheduler;
inline int current = 0;
inline int threads = 0;
inline std::string fault;
inline const std::function<void()>* body = nullptr;

inline int describe(const char* name, const void* data, int64_t bytes) {
  ranges.push_back({name, static_cast<const char*>(data), bytes});
  return static_cast<int>(ranges.size()) - 1;
}

inline void touch(int id, const void* at, int bytes, int element, bool write) {
  if (id < 0) throw Fault("access to a tensor that is absent");
  const Range& range = ranges[id];
  const int64_t offset = static_cast<const char*>(at) - range.data;
  if (offset < 0 || offset + bytes > range.bytes)
    throw Fault((write ? "write to " : "read from ") + range.name + " out of bounds: byte " + std::to_string(offset) + " of " +
                std::to_string(range.bytes));
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) throw Fault("misaligned access to " + range.name);
  (write ? counts[range.name].written : counts[range.name].read) += bytes / element;
}

template <typename T>
struct Shared {
  int count;
  void check(int at) const {
    if (at < 0 || at >= count) throw Fault("shared memory out of bounds: element " + std::to_string(at));
  }
  T read(int at) const {
    check(at);
    if (!written[at * sizeof(T)]) throw Fault("read of shared memory that nobody wrote: element " + std::to_string(at));
    T value;
    std::memcpy(&value, &memory[at * sizeof(T)], sizeof(T));
    return value;
  }
  void write(int at, T value) const {
    check(at);
    std::memcpy(&memory[at * sizeof(T)], &value, sizeof(T));
    written[at * sizeof(T)] = 1;
  }
};

// A kernel has one array of shared memory.
template <typename T>
Shared<T> shared(int count) {
  if (memory.size() < count * sizeof(T)) {
    memory.resize(count * sizeof(T));
    written.resize(count * sizeof(T), 0);
  }
  return {count};
}

inline void wait(State state) {
  fibers[current].state = state;
  swapcontext(&fibers[current].context, &scheduler);
}

inline void enter() {
  try {
    (*body)();
  } catch (const Fault& error) {
    fault = error.what();
  }
  fibers[current].state = State::done;
}

}  // namespace emulation

inline emulation::Dim threadIdx, blockIdx, blockDim;

inline void __syncthreads() { emulation::wait(emulation::State::barrier); }

inline float __shfl_xor_sync(unsigned mask, float value, int apart) {
  using namespace emulation;
  const int self = current;
  if (!(mask >> (self % 32) & 1)) throw Fault("shuffle by a lane that is not in its mask");
  fibers[self].value = value;
  fibers[self].mask = mask;
  wait(State::shuffle);
  const float result = fibers[self ^ apart].value;
  // The value must stay until every lane has read it.
  wait(State::shuffle);
  return result;
}

namespace emulation {

inline bool release_shuffles() {
  bool released = false;
  for (int warp = 0; warp < threads; warp += 32) {
    const int lanes = threads - warp < 32 ? threads - warp : 32;
    unsigned waiting = 0;
    for (int lane = 0; lane < lanes; ++lane)
      if (fibers[warp + lane].state == State::shuffle) waiting |= 1u << lane;
    for (int lane = 0; lane < lanes; ++lane) {
      Fiber& fiber = fibers[warp + lane];
      if (fiber.state != State::shuffle || (fiber.mask & ~waiting) != 0) continue;
      fiber.state = State::ready;
      released = true;
    }
  }
  return released;
}

inline bool release_barrier() {
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state != State::barrier) return false;
  for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
  return true;
}

inline bool any(State state) {
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state == state) return true;
  return false;
}

// Starts in the middle and strides by an odd number: no order that a kernel could come to rely on.
inline int64_t permuted(int64_t index, int64_t count) {
  int64_t stride = 7;
  while (count % stride == 0) stride += 6;
  for (int64_t a = stride, b = count; b != 0;) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
    if (b == 0 && a != 1) return count - 1 - index;
  }
  return (count / 2 + index % count * (stride % count)) % count;
}

inline void run_block(int64_t block) {
  blockIdx.x = static_cast<int>(block);
  blockDim.x = threads;
  std::fill(written.begin(), written.end(), 0);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    if (!fiber.stack) fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::ready;
  }
  while (fault.empty()) {
    for (int64_t i = 0; i < threads && fault.empty(); ++i) {
      current = static_cast<int>(permuted(i, threads));
      if (fibers[current].state != State::ready) continue;
      threadIdx.x = current;
      swapcontext(&scheduler, &fibers[current].context);
    }
    if (!fault.empty()) return;
    if (release_shuffles() || release_barrier()) continue;
    if (any(State::shuffle)) fault = "a shuffle with missing lanes";
    else if (any(State::barrier)) fault = "a barrier not reached by all threads";
    else return;
  }
}

inline void launch(const char* name, int64_t blocks, int block_threads, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  body = &kernel;
  threads = block_threads;
  fault.clear();
  for (int64_t i = 0; i < blocks && fault.empty(); ++i) run_block(permuted(i, blocks));
  if (!fault.empty()) throw std::runtime_error(std::string(name) + ": " + fault);
}

}  // namespace emulation
