// The loader of the CPU library: which instruction set is used, chosen once. `ditkernels::cpu_isa() -> str` names it.
//
// This file and the ops are compiled for x86-64 as it was in 2003, so that the library loads everywhere and says what is missing.
#include <cstdlib>

#include "host.h"

namespace ditkernels {
namespace {

// By this string the package knows the library before it loads it: kind, version, and a hash of the ops' schemas.
[[gnu::used]] const char MARK[] = DITKERNELS_MARK;

#define DITKERNELS_NAME(isa, _) #isa,
const char* const NAMES[] = {DITKERNELS_EVERY_ISA(DITKERNELS_NAME, _)};
constexpr int COUNT = sizeof(NAMES) / sizeof(NAMES[0]);

// How many of the instruction sets, from the first on, this processor has.
int supported() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has[] = {
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
          __builtin_cpu_supports("f16c"),
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
      __builtin_cpu_supports("avx512bf16") != 0};
  int count = 0;
  while (count < COUNT && has[count]) ++count;
  return count;
#else
  return COUNT;
#endif
}

std::string listed(int count) {
  std::string names;
  for (int i = 0; i < count; ++i) names += (i > 0 ? ", " : "") + std::string(NAMES[i]);
  return names;
}

// The place of an instruction set in NAMES, for a processor that has the first `count`. `forced` is empty, or the name of one.
int choose(int count, const std::string& forced) {
  STD_TORCH_CHECK(
      count > 0,
      "this processor is older than x86-64-v3 (AVX2, FMA, BMI2, F16C), which the cpu backend needs; the torch backend serves");
  if (count > COUNT) count = COUNT;
  if (forced.empty()) return count - 1;
  for (int i = 0; i < count; ++i)
    if (forced == NAMES[i]) return i;
  STD_TORCH_CHECK(false, "DITKERNELS_CPU_ISA: got '", forced, "', this processor and this library have ", listed(count));
}

std::string cpu_isa() { return NAMES[isa()]; }

// What would be chosen for another processor, for tests.
std::string cpu_isa_of(int64_t count, std::string forced) { return NAMES[choose(static_cast<int>(count), forced)]; }

}  // namespace

int isa() {
  static const int chosen = [] {
    const char* forced = std::getenv("DITKERNELS_CPU_ISA");
    return choose(supported(), forced == nullptr ? "" : forced);
  }();
  return chosen;
}

}  // namespace ditkernels

STABLE_TORCH_LIBRARY_FRAGMENT(ditkernels, library) {
  library.def("cpu_isa() -> str");
  library.def("cpu_isa_of(int count, str forced) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_isa", TORCH_BOX(&ditkernels::cpu_isa));
  library.impl("cpu_isa_of", TORCH_BOX(&ditkernels::cpu_isa_of));
}
