// The norm family's forward, for the ops that end in a norm: norm.cpp has it, final_layer calls it too.
#pragma once

#include "isa.h"

namespace ditkernels {

// `x1` is absent where it is not kept, `branch` where there is none, `h` in gated_residual; `stats` is null if it is not kept.
// An h of fp32 holds values rounded to the dtype `rounding`. `by_token`: a token takes the row `index` (B, N) of gate, shift and scale,
// (B, K, D); the row of its own number where that is null. `branch_norm`: the branch is RMS-normed first, with `branch_weight` in the
// place of the branch's bias; `branch_stats` takes 1/rms of each of its rows, and is null if it is not kept.
struct NormForward {
  Tokens x, branch, x1, h;
  Vector gate, branch_bias, shift, scale, weight, bias;
  float* stats;
  int64_t tokens, width;
  int rounding;
  bool rms;
  float eps;
  const int64_t* index;
  bool by_token;
  bool branch_norm;
  float branch_eps;
  Vector branch_weight;
  float* branch_stats;
};

void norm_forward(const NormForward& a, int64_t samples);

}  // namespace ditkernels
