// Runs CUDA sources on the host, for tests: every thread of a block is a fiber; blocks, warps and lanes run in permuted order.
//
// Faults end the launch with an error that names the kernel: an access outside a tensor or misaligned, an access to shared memory
// outside what the launch asked for, a read of shared memory that nobody wrote, two threads that share a place without a barrier
// between them, a barrier that some threads never reach, a shuffle with missing lanes; while tracing, also a block that touches
// what another block of the launch wrote. Accesses are counted by kernel and tensor, while tracing by element; while sampling, in bytes
// for a few blocks of a launch.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
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
#include <utility>
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

// ---- Tensors: bounds and counts -------------------------------------------------------------------------------------

// Elements read and written; while tracing, how often each one was.
struct Count {
  int64_t read = 0, written = 0;
  std::vector<uint32_t> reads, writes;
};

struct Range {
  std::string name;
  const char* data;
  int64_t bytes;
  // While tracing, by element: the launch and block that last wrote it.
  std::vector<int64_t> writers;
  int64_t launch = -1;
  Count* count = nullptr;
};

// What a sample of blocks read and wrote, in bytes, by tensor: a map a block.
struct Traffic {
  int64_t read = 0, written = 0;
};

struct Launched {
  std::string kernel;  // with its template arguments
  int64_t blocks;
  int threads;
  int64_t shared;
  std::vector<std::map<std::string, Traffic>> traffic;
};

inline std::deque<Range> ranges;
inline std::vector<Launched> sampled;  // only while sampling
inline std::map<std::pair<std::string, std::string>, Count> counts;
inline bool tracing = false;
inline int order = 0;
inline bool last_block_only = false;
// Of a kernel and its blocks, those that run; what they do is written down. By default all run, and nothing is.
inline std::function<std::vector<int64_t>(const std::string&, int64_t)> sample;
inline int mutant = 0;  // which planted fault is active in sources that hold some
inline int64_t launches = 0;
inline int64_t current_block = 0;
inline std::string kernel_name;

inline int describe(const char* name, const void* data, int64_t bytes) {
  ranges.push_back({name, static_cast<const char*>(data), bytes, {}, -1, nullptr});
  return static_cast<int>(ranges.size()) - 1;
}

inline void trace(Range& range, Count& count, int64_t first, int64_t elements, int64_t size, bool write) {
  constexpr int64_t BLOCKS = int64_t{1} << 31;
  const size_t all = range.bytes / size;
  auto& touched = write ? count.writes : count.reads;
  if (touched.size() < all) touched.resize(all, 0);
  if (range.writers.size() < all) range.writers.resize(all, -1);
  for (int64_t i = first; i < first + elements; ++i) {
    ++touched[i];
    int64_t& writer = range.writers[i];
    const int64_t self = launches * BLOCKS + current_block;
    if (writer / BLOCKS == launches && writer != self) throw Fault(range.name + ": a block touches what another block wrote");
    if (write) writer = self;
  }
}

inline void touch(int id, const void* at, int bytes, int element, bool write) {
  if (id < 0) throw Fault("access to a tensor that is absent");
  Range& range = ranges[id];
  const int64_t offset = static_cast<const char*>(at) - range.data;
  if (offset < 0 || offset + bytes > range.bytes)
    throw Fault(
        (write ? "write to " : "read from ") + range.name + " out of bounds: byte " + std::to_string(offset) + " of " +
        std::to_string(range.bytes));
  if (reinterpret_cast<uintptr_t>(at) % bytes != 0) throw Fault("misaligned access to " + range.name);
  if (range.launch != launches) {
    range.launch = launches;
    range.count = &counts[{kernel_name, range.name}];
  }
  (write ? range.count->written : range.count->read) += bytes / element;
  if (sample) {
    Traffic& traffic = sampled.back().traffic.back()[range.name];
    (write ? traffic.written : traffic.read) += bytes;
  }
  if (tracing) trace(range, *range.count, offset / element, bytes / element, element, write);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

enum class State { ready, barrier, shuffle, done };

constexpr size_t STACK = 256 * 1024;
constexpr int WARP = 32;
constexpr size_t MOST_SHUFFLED = 64;

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  bool started = false;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  int64_t meetings = 0;  // of its warp, so far
  int64_t shuffles = 0;
  char value[2][MOST_SHUFFLED];
};

inline std::vector<Fiber> fibers(1024);
inline ucontext_t outside;
inline jmp_buf scheduler;
inline int current = 0;
inline int threads = 0;
inline int64_t barriers = 0;
inline std::string fault;
inline const std::function<void()>* body = nullptr;

inline void wait(State state) {
  Fiber& self = fibers[current];
  self.state = state;
  if (_setjmp(self.place) == 0) _longjmp(scheduler, 1);
}

inline void enter() {
  try {
    (*body)();
  } catch (const Fault& error) {
    fault = error.what();
  }
  fibers[current].state = State::done;
  _longjmp(scheduler, 1);
}

// ---- Shared memory, in pieces of two bytes --------------------------------------------------------------------------

constexpr int PIECE = 2;

// Who last touched a piece, and when: between two barriers, and two meetings of a warp, places belong to one writer.
struct Access {
  int thread = -1;
  int64_t barriers = 0, meetings = 0;

  bool conflicts() const {
    if (thread < 0 || thread == current || barriers != emulation::barriers) return false;
    return thread / WARP != current / WARP || meetings == fibers[current].meetings;
  }
};

struct Piece {
  bool written = false;
  Access writer, reader;
};

inline std::vector<char> memory;
inline std::vector<Piece> pieces;
inline int64_t shared_bytes = 0;

inline void touch_shared(int64_t offset, int bytes, bool write) {
  if (offset < 0 || offset + bytes > shared_bytes)
    throw Fault("shared memory out of bounds: byte " + std::to_string(offset) + " of " + std::to_string(shared_bytes));
  if (offset % bytes != 0) throw Fault("misaligned access to shared memory");
  const Access self{current, barriers, fibers[current].meetings};
  for (int64_t i = offset / PIECE; i < (offset + bytes) / PIECE; ++i) {
    Piece& piece = pieces[i];
    if (!write && !piece.written) throw Fault("read of shared memory that nobody wrote: byte " + std::to_string(i * PIECE));
    if (piece.writer.conflicts() || (write && piece.reader.conflicts()))
      throw Fault("two threads share memory without a barrier between them: byte " + std::to_string(i * PIECE));
    (write ? piece.writer : piece.reader) = self;
    if (write) piece.written = true;
  }
}

inline char* shared_at(int64_t offset, int bytes, bool write) {
  touch_shared(offset, bytes, write);
  return memory.data() + offset;
}

// Every lane's value, by lane: each waits until all have given theirs. Two generations, so that nobody has to wait again until all
// have taken.
template <typename T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= MOST_SHUFFLED);
  const int half = fibers[current].shuffles++ % 2;
  std::memcpy(fibers[current].value[half], &value, sizeof(T));
  wait(State::shuffle);
  std::memcpy(&value, fibers[current / WARP * WARP + source].value[half], sizeof(T));
  return value;
}

// ---- Scheduling -----------------------------------------------------------------------------------------------------

// A permutation of 0 .. count - 1, another one for every order.
inline int64_t permuted(int64_t index, int64_t count, int salt) {
  int64_t stride = (7 + 6 * static_cast<int64_t>(order + salt)) % count;
  const auto divides = [count](int64_t a) {
    for (int64_t b = count; b != 0;) a = std::exchange(b, a % b);
    return a != 1;
  };
  while (count > 1 && divides(stride)) stride = (stride + 1) % count;
  const int64_t moved = static_cast<int64_t>((static_cast<__int128>(index) * stride + count / 2 + order) % count);
  return order % 2 == 0 ? moved : count - 1 - moved;
}

}  // namespace emulation

inline emulation::Dim threadIdx, blockIdx, blockDim;

inline void __syncthreads() { emulation::wait(emulation::State::barrier); }

inline void __syncwarp() {
  emulation::wait(emulation::State::shuffle);
  ++emulation::fibers[emulation::current].meetings;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source) {
  if (mask != 0xffffffffu) throw emulation::Fault("a shuffle of part of a warp");
  return emulation::shuffle(value, source);
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int apart) {
  return __shfl_sync(mask, value, (emulation::current % emulation::WARP) ^ apart);
}

namespace emulation {

inline void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

inline bool all(int first, int count, State state) {
  for (int i = first; i < first + count; ++i)
    if (fibers[i].state != state) return false;
  return true;
}

inline bool any(State state) {
  for (int i = 0; i < threads; ++i)
    if (fibers[i].state == state) return true;
  return false;
}

// Runs a warp until each of its lanes waits at a barrier or is done.
inline void run_warp(int warp) {
  const int first = warp * WARP, lanes = std::min(WARP, threads - first);
  while (fault.empty()) {
    for (int i = 0; i < lanes && fault.empty(); ++i) {
      const int thread = first + static_cast<int>(permuted(i, lanes, 1));
      if (fibers[thread].state == State::ready) resume(thread);
    }
    if (!fault.empty() || !all(first, lanes, State::shuffle)) break;
    for (int i = 0; i < lanes; ++i) fibers[first + i].state = State::ready;
  }
  for (int i = 0; i < lanes && fault.empty(); ++i)
    if (fibers[first + i].state == State::shuffle) fault = "a shuffle with missing lanes";
}

inline void prepare(int thread) {
  Fiber& fiber = fibers[thread];
  if (!fiber.stack) {
    fiber.stack.reset(new char[STACK]);
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = &outside;
    makecontext(&fiber.start, enter, 0);
  }
  fiber.started = false;
  fiber.state = State::ready;
  fiber.meetings = fiber.shuffles = 0;
}

inline void run_block(int64_t block) {
  current_block = block;
  blockIdx.x = static_cast<int>(block);
  blockDim.x = threads;
  std::fill(pieces.begin(), pieces.begin() + shared_bytes / PIECE, Piece{});
  for (int i = 0; i < threads; ++i) prepare(i);
  const int warps = (threads + WARP - 1) / WARP;
  for (barriers = 0; fault.empty(); ++barriers) {
    for (int i = 0; i < warps && fault.empty(); ++i) run_warp(static_cast<int>(permuted(i, warps, 2)));
    if (!fault.empty() || !any(State::barrier)) return;
    if (!all(0, threads, State::barrier)) {
      fault = "a barrier not reached by all threads";
      return;
    }
    for (int i = 0; i < threads; ++i) fibers[i].state = State::ready;
  }
}

inline void launch(
    const std::string& name, int64_t blocks, int block_threads, int64_t shared, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  body = &kernel;
  kernel_name = name.substr(0, name.find('<'));
  threads = block_threads;
  shared_bytes = (shared + 15) / 16 * 16;
  memory.resize(std::max<size_t>(memory.size(), shared_bytes));
  pieces.resize(std::max<size_t>(pieces.size(), shared_bytes / PIECE));
  fault.clear();
  ++launches;
  if (last_block_only) {
    run_block(blocks - 1);
  } else if (sample) {
    sampled.push_back({name, blocks, block_threads, shared, {}});
    for (int64_t i : sample(name, blocks)) {
      if (!fault.empty()) break;
      sampled.back().traffic.emplace_back();
      run_block(i);
    }
  } else {
    for (int64_t i = 0; i < blocks && fault.empty(); ++i) run_block(permuted(i, blocks, 3));
  }
  if (!fault.empty()) throw std::runtime_error(kernel_name + ": " + fault);
}

}  // namespace emulation
