// The norm family's forward, for the ops that end in a norm: norm.cpp has it, final_layer calls it too.
#pragma once

#include "isa.h"

namespace ditkernels {

// `x1` is absent where it is not kept, `branch` where there is none, `h` in gated_residual; `stats` is null if it is not kept.
// An h of fp32 holds values rounded to the dtype `rounding`.
struct NormForward {
  Tokens x, branch, x1, h;
  Vector gate, branch_bias, shift, scale, weight, bias;
  float* stats;
  int64_t tokens, width;
  int rounding;
  bool rms;
  float eps;
};

void norm_forward(const NormForward& a, int64_t samples);

}  // namespace ditkernels
