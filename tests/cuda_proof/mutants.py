"""Every planted fault in the CUDA sources is found by the parity checks or by the emulation itself.

All faults stand in one build: «expression» in the source becomes a choice, made at run time, between itself and the faulty one.
Only the general path is compiled, which is the same code at dtypes known at run time and element accesses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import emulated_cuda
import pytest
import test_adamw_ema
import test_bias_gelu
import test_final_layer
import test_mlp
import test_patch_embed
import test_qkv
import torch
from numerics import assert_contract
from patches_mutants import check_final_layer, check_patch_embed
from test_adaln import BF16, F16, F32, assert_parity, make_inputs

from ditkernels import reference
from ditkernels.ops import _registry as registry
from ditkernels.ops.final_layer import final_layer
from ditkernels.ops.mlp import mlp
from ditkernels.ops.patch_embed import patch_embed

ADALN, SUMS, EMBED, FINAL, COMMON, TURNED = (
    *("adaln.cu", "sums.cuh", "patch_embed.cu", "final_layer.cu", "common.cuh", "turned.cuh"),
)
GELU = "bias_gelu.cu"
ADAMW = "adamw_ema.cu"
MLP = "mlp.cu"
FINAL_BACKWARD, FINAL_SHARED = "final_layer_backward.cu", "final_layer.cuh"
QKV = "qkv.cu"

# By name: the file, a place in it that occurs once with the expression marked, and what takes the expression's place.
MUTANTS = {
    # ------------------------------------------------------------------------------------------------ adaln
    "gate zeroed": (ADALN, "row[r].at[i] + «gate.at[i]» * (u", "0.0f"),
    "branch bias ignored": (ADALN, "(u[r].at[i] + «branch_bias.at[i]»)", "0.0f"),
    "stream not rounded": (ADALN, "row[r].at[i] = «rounded<T>(value, a.x.dtype)»;", "value"),
    "mean forgotten": (ADALN, "? row[r].at[i] - «mean» : 0.0f", "0.0f"),
    "column mask of the squares dropped": (ADALN, "«column + i < width» ? row[r].at[i] - mean", "true"),
    "eps dropped": (ADALN, "sqrtf(sums[r] / width + «a.eps»)", "0.0f"),
    "eps divided by D": (ADALN, "sqrtf(sums[r] / width + «a.eps»)", "a.eps / width"),
    "eps outside the root": (  # sqrt(v) + eps = sqrt(v + 2 eps sqrt(v) + eps²)
        *(ADALN, "sqrtf(sums[r] / width + «a.eps»)", "a.eps * (2.0f * sqrtf(sums[r] / width) + a.eps)"),
    ),
    "weight ignored": (ADALN, "row[r].at[i] * rstd * «weight.at[i]» +", "1.0f"),
    "bias after the modulation": (ADALN, "rstd * weight.at[i] + «bias.at[i]»;", "0.0f"),
    "scale without the one": (ADALN, "affine * («1.0f» + scale.at[i])", "0.0f"),
    "shift and scale swapped": (
        *(ADALN, "load<WIDE>(«a.scale», sample, column, width, 0.0f);\n    const Unit shift", "a.shift"),
    ),
    "shift ignored": (ADALN, "(1.0f + scale.at[i]) + «shift.at[i]»;", "0.0f"),
    "batch index of x dropped": (ADALN, "load<WIDE>(a.x, «sample», first + r", "0"),
    "batch index of the branch dropped": (ADALN, "load<WIDE>(a.branch, «sample», first + r", "0"),
    "batch index of the gate dropped": (ADALN, "const Unit gate = load<WIDE>(a.gate, «sample», column", "0"),
    "batch index of the shift dropped": (ADALN, "load<WIDE>(a.shift, «sample», column", "0"),
    "batch index of h dropped": (ADALN, "store<WIDE>(a.h, «sample», first + r", "0"),
    "slope without the one": (ADALN, "slope.at[i] *= «1.0f» + scale.at[i]", "0.0f"),
    "batch index of dh dropped": (ADALN, "load<WIDE>(a.dh, «sample», token", "0"),
    "batch index of dx1 dropped": (ADALN, "load<WIDE>(a.dx1, «sample», token", "0"),
    "stream's gradient lost": (ADALN, "if («!NORM || has_dx1») stream[k] = load", "false"),
    "P after the slope": (ADALN, "p.at[i] += «dnormed[k].at[i]»;", "dnormed[k].at[i] * slope.at[i]"),
    "Q without x̂": (ADALN, "q.at[i] += «dnormed[k].at[i] * normed[k].at[i]»;", "dnormed[k].at[i]"),
    "R lost": (ADALN, "r.at[i] += «stream[k].at[i] * u[k].at[i]»;", "0.0f"),
    "S lost": (ADALN, "s.at[i] += «stream[k].at[i]»;", "0.0f"),
    "slope forgotten in dx̂": (ADALN, "dnormed[k].at[i] *= «slope.at[i]»;", "1.0f"),
    "mean of dx̂ not subtracted": (ADALN, "(dnormed[k].at[i] - «along_mean» - ", "0.0f"),
    "x̂'s share not subtracted": (ADALN, "normed[k].at[i] * «along_normed»);", "0.0f"),
    "rstd forgotten in dx": (ADALN, "stream[k].at[i] += «rstd[k]» *", "1.0f"),
    "dbranch without the gate": (ADALN, "dbranch.at[i] = «gate.at[i]» *", "1.0f"),
    "every chunk starts at the first": (
        *(ADALN, "first = «blockIdx.x % a.chunks * a.chunk_rows»;", "int64_t{0}"),
    ),
    "the last chunk runs on": (
        ADALN,
        "first + a.chunk_rows < «a.length» ? a.chunk_rows",
        "a.length + a.chunk_rows",
    ),
    "one chunk's rows lost": (ADALN, "for (int start = «0»; start < count", "ROWS"),
    # ------------------------------------------------------------------------------------------------ sums
    "one chunk's sums lost": (SUMS, "for (int64_t chunk = «0»; chunk", "1"),
    "P and Q swapped": (SUMS, "p += load_one(a.partial, sample, «chunk * SUMS», column)", "chunk * SUMS + 1"),
    "bias forgotten in dscale": (SUMS, "«load_one(a.bias, 0, column, 0.0f)» * p", "0.0f"),
    "weight forgotten in dscale": (SUMS, "«load_one(a.weight, 0, column, 1.0f)» * q", "1.0f"),
    "branch bias forgotten in dgate": (SUMS, "«load_one(a.branch_bias, 0, column, 0.0f)» * s", "0.0f"),
    "sums' slope without the one": (SUMS, "slope = «1.0f» + load_one", "0.0f"),
    "batch index of the sums' scale dropped": (SUMS, "load_one(a.scale, «sample», column, 0.0f)", "0"),
    "scale forgotten in dweight": (SUMS, "sample, 0, column, «slope» * q", "1.0f"),
    "scale forgotten in dbias": (SUMS, "sample, 1, column, «slope» * p", "1.0f"),
    "gate forgotten in dbranch_bias": (SUMS, "«load_one(a.gate, sample, column, 1.0f)» * s", "1.0f"),
    "one sample's terms lost": (
        *(SUMS, "for (int64_t sample = «threadIdx.x / WARP»; sample", "1 + threadIdx.x / WARP"),
    ),
    "samples added twice": (SUMS, "sample < a.batch; sample += «GROUP_WARPS»", "1"),
    "samples beyond the first round lost": (SUMS, "sample < a.batch; sample += «GROUP_WARPS»)", "a.batch"),
    "one term for all": (SUMS, "parts.write(«i * GROUP_THREADS» + threadIdx.x", "0"),
    "one group lost": (SUMS, "for (int64_t group = «threadIdx.x / WARP»; group", "1 + threadIdx.x / WARP"),
    "groups added twice": (SUMS, "group < a.groups; group += «GROUP_WARPS»", "1"),
    "one warp's groups lost": (SUMS, "for (int warp = «1»; warp < GROUP_WARPS", "2"),
    "one warp's groups for all": (SUMS, "parts.read(i * GROUP_THREADS + «warp * WARP» + threadIdx.x)", "0"),
    # ------------------------------------------------------------------------------------------------ common
    "one lane's sums lost": (COMMON, "for (int warp = «0»; warp < warps", "1"),
    "a quarter of the summands lost": (COMMON, "for (int quarter = «0»; quarter", "1"),
    "even and odd columns swapped": (COMMON, "sums[j][0] += above.at[i] * «even.at[i]»;", "odd.at[i]"),
    "rows of a tile swapped": (COMMON, "sums[j][2] += «below.at[i]» *", "above.at[i]"),
    "columns dealt out wrongly": (
        COMMON,
        "lane_row() / 2 * UNIT + «tile * 2 + lane_row() % 2»;",
        "tile + lane_row() % 2 * 4",
    ),
    "halves of a tile swapped": (COMMON, "unit.at[i] = «half == 0» ? sums", "half != 0"),
    "across the wrong rows": (COMMON, "«i / 2 * UNIT + lane_quarter() * 2 + i % 2»;", "i / 2 * UNIT"),
    "turned weight not turned": (
        TURNED,
        "? «load_one(a.weight, 0, at, row)» :",
        "load_one(a.weight, 0, 0, row)",
    ),
    # ------------------------------------------------------------------------------------------------ patch_embed
    "sample of a line ignored": (EMBED, "return {«sample», static_cast<int>(line", "int64_t{0}"),
    "channel of a value ignored": (EMBED, "channel = «value / (a.patch * a.patch)»;", "0"),
    "patch transposed": (EMBED, "row = «value / a.patch % a.patch», channel", "value % a.patch"),
    "rows and columns of the grid swapped": (
        EMBED,
        "«line.token / a.grid_w») * a.patch + row",
        "line.token % a.grid_w",
    ),
    "patches not rounded": (
        EMBED,
        "inside ? «rounded<Any>(patch_value(a, line, first + at), weight)»",
        "patch_value(a, line, first + at)",
    ),
    "line mask dropped": (EMBED, "const bool live = «start + row < last»;", "true"),
    "bias of the embedding ignored": (EMBED, "unit.at[i] += «bias.at[i]» + pos.at[i];", "0.0f"),
    "bias ignored without positions": (EMBED, "unit.at[i] += «bias.at[i]»;\n  }\n  store", "0.0f"),
    "positions ignored": (EMBED, "+= bias.at[i] + «pos.at[i]»;", "0.0f"),
    "positions of the line and not of the token": (
        EMBED,
        "load<WIDE>(a.pos, 0, «line % a.patches.length»",
        "line",
    ),
    "line mask of y dropped": (EMBED, "if («line >= a.lines» || column >= a.width) return;", "false"),
    "values beyond the first tile lost": (EMBED, "for (int from = 0; from < «a.patches.values»", "1"),
    "only the first slice of values": (
        EMBED,
        "depth < VALUES && «from + depth < a.patches.values»;",
        "depth < 1",
    ),
    "column tiles beyond the first lost": (EMBED, "column < «a.width»; column += a.parts", "1"),
    "group starts at the first line": (EMBED, "const int64_t first = «group * a.group_lines»;", "int64_t{0}"),
    "one block of a group lost": (
        EMBED,
        "for (int64_t start = «first»; start < last; start += LINES)",
        "first + LINES",
    ),
    "dbias lost": (EMBED, "bias.at[k] += «units[i].at[k]»;", "0.0f"),
    "dbias of some rows": (EMBED, "for (int row = «0»; row < ROWS; ++row) total", "1"),
    "batch index of dy dropped": (EMBED, "units[i] = load<WIDE>(a.dy, «place.sample»", "0"),
    "dW's channel and value swapped": (
        EMBED,
        "lane_row() + «i / 2 * 8»;\n        const int place",
        "i % 2 * 8",
    ),
    "dx of half the lines": (EMBED, "const int64_t number = first + i * TILE_ROWS + «half * 8» +", "0"),
    "dx's channels beyond the first lost": (
        *(EMBED, "column - lane_quarter() * UNIT < «a.width»; column += DEPTH", "1"),
    ),
    "batch index of dx's dy dropped": (EMBED, "narrowed<T>(load<WIDE>(a.dy, «place.sample»", "0"),
    "one sample's positions lost": (EMBED, "for (int64_t sample = «0»; sample < a.batch", "1"),
    # ------------------------------------------------------------------------------------------------ final_layer
    "last gate zeroed": (FINAL_SHARED, "x.at[i] + «gate.at[i]» * (branch", "0.0f"),
    "last branch bias ignored": (FINAL_SHARED, "(branch.at[i] + «bias.at[i]»)", "0.0f"),
    "norm's weight ignored": (FINAL_SHARED, "(normed.at[i] * «weight.at[i]» + bias", "1.0f"),
    "norm's bias ignored": (FINAL_SHARED, "weight.at[i] + «bias.at[i]») * factor", "0.0f"),
    "scale ignored": (FINAL_SHARED, "bias.at[i]) * «factor.at[i]» + shift", "1.0f"),
    "shift of the last layer ignored": (FINAL_SHARED, "factor.at[i] + «shift.at[i]»;", "0.0f"),
    "factor without the one": (FINAL_SHARED, "factor.at[i] += «1.0f»;", "0.0f"),
    "batch index of the last shift dropped": (FINAL_SHARED, "load<WIDE>(v.shift, «sample», column", "0"),
    "batch index of the last scale dropped": (FINAL_SHARED, "load<WIDE>(v.scale, «sample», column", "0"),
    "batch index of the last gate dropped": (FINAL_SHARED, "load<WIDE>(v.gate, «sample», column", "0"),
    "slope ignored": (FINAL_BACKWARD, "slope.at[i] *= «factor.at[i]»;", "1.0f"),
    "channel of the image ignored": (FINAL_SHARED, "return body(\n      «value % grid.channels», token", "0"),
    "row of the patch ignored": (FINAL_SHARED, "* grid.patch + «place / grid.patch»,", "0"),
    "column of the patch ignored": (FINAL_SHARED, "* grid.patch + «place % grid.patch»);", "0"),
    "rows and columns of the image swapped": (
        FINAL_SHARED,
        "«token / grid.columns» * grid.patch",
        "token % grid.columns",
    ),
    "last mean forgotten": (FINAL, "? unit.at[k] - «mean» : 0.0f", "0.0f"),
    "last column mask dropped": (FINAL, "unit.at[k] = «own_column(i) + k < width» ? unit", "true"),
    "last eps dropped": (FINAL, "/ width + «a.eps»);", "0.0f"),
    "batch index of the last x dropped": (FINAL, "Unit unit = load<WIDE>(a.x, «sample», token", "0"),
    "batch index of the last branch dropped": (
        FINAL,
        "unit, load<WIDE>(a.branch, «sample», token, column, width), Direct",
        "0",
    ),
    "h not rounded": (FINAL_SHARED, "unit.at[i] = «rounded<U>(unit.at[i], weight)»;", "unit.at[i]"),
    "bias of the linear ignored": (FINAL, "float z = «load_one(a.bias, 0, at, 0.0f)»;", "0.0f"),
    "one warp's part lost": (FINAL, "for (int part = «place / DEPTH»; part", "place / DEPTH + abreast"),
    "values beyond the first tiles lost": (FINAL, "for (int start = 0; start < «tiles»; start", "1"),
    "row mask of the image dropped": (FINAL, "row >= rows || «first + row >= a.length» ||", "false"),
    "batch index of the image dropped": (FINAL, "store_one(a.out, «sample», channel", "0"),
    "slope's share lost": (FINAL_BACKWARD, "slope_sum += «weight.at[k] * slope.at[k]»;", "0.0f"),
    "offset lost": (FINAL_BACKWARD, "offset += «weight.at[k] * origin.at[k]»;", "0.0f"),
    "offset without the linear's bias": (
        FINAL_BACKWARD,
        "+ «load_one(a.bias, 0, value, 0.0f)»;\n  if",
        "0.0f",
    ),
    "mean of dx̂ lost": (FINAL_BACKWARD, "along_mean += «dz» * load_one(a.terms, sample", "0.0f"),
    "mean of dx̂ · x̂ without the offset": (
        FINAL_BACKWARD,
        "(z - «load_one(a.terms, sample, 1, value)»)",
        "0.0f",
    ),
    "means of one sample": (FINAL_BACKWARD, "store_one(a.means, «sample», token, 1", "0"),
    "batch index of the terms dropped": (FINAL_BACKWARD, "load_one(a.terms, «sample», 0, value)", "0"),
    "batch index of dout dropped": (FINAL_BACKWARD, "load_one(a.dout, «sample», channel", "0"),
    "batch index of z dropped": (FINAL_BACKWARD, "load_one(a.out, «sample», channel", "0"),
    "mean forgotten in the backward": (FINAL_BACKWARD, "unit.at[i] = (unit.at[i] - «mean») * rstd;", "0.0f"),
    "dx without the slope": (FINAL_BACKWARD, "(dh.at[i] * «slope.at[i]» - along_mean", "1.0f"),
    "last P of dx̂": (FINAL_BACKWARD, "sums.of[0].at[i] += «dh.at[i]»;", "dh.at[i] * slope.at[i]"),
    "last Q without x̂": (FINAL_BACKWARD, "sums.of[1].at[i] += «dh.at[i] * normed.at[i]»;", "dh.at[i]"),
    "last R lost": (FINAL_BACKWARD, "sums.of[2].at[i] += «dx.at[i] * branch.at[i]»;", "0.0f"),
    "last S lost": (FINAL_BACKWARD, "sums.of[3].at[i] += «dx.at[i]»;", "0.0f"),
    "last dbranch without the gate": (FINAL_BACKWARD, "dx.at[i] *= «gate.at[i]»;", "1.0f"),
    "one band of rows lost": (FINAL_BACKWARD, "for (int other = «0»; other < ROW_BANDS", "1"),
    "chunks of one sample": (FINAL_BACKWARD, "store_one(to, sample, «chunk» * SUMS +", "0"),
    "one chunk of a group lost": (
        FINAL_BACKWARD,
        "for (int64_t chunk = «group * a.group_chunks»; chunk < end; ++chunk) {\n"
        "    const int64_t sample = chunk / a.chunks, first = chunk % a.chunks * a.chunk_rows;\n"
        "    const int64_t last = first + a.chunk_rows < a.length ? first + a.chunk_rows : a.length;\n"
        "    stage<WIDE, COLUMNS>",
        "group * a.group_chunks + 1",
    ),
    "vectors of one sample": (
        FINAL_BACKWARD,
        "stage<WIDE, COLUMNS>(staged, a.vectors, «sample», first_column",
        "0",
    ),
    "values of dW lost": (
        FINAL_BACKWARD,
        "inside = start + row < last && «from + value < a.padded»;",
        "value < 8",
    ),
    "dW of x̂": (FINAL_BACKWARD, "if constexpr (HELD > 0) h = «modulated(normed, vectors)»;", "normed"),
    "dbias of the last layer lost": (
        FINAL_BACKWARD,
        "bias_sum += «static_cast<float>(values.read(at * DZ_STRIDE + threadIdx.x))»;",
        "0.0f",
    ),
    "dW's rows beyond the first band": (FINAL_BACKWARD, "value + lane_row() + «i / 2 * 8», at", "0"),
    "unpatchify's row and column swapped": (
        *(
            FINAL,
            "«row % a.grid.patch» * a.grid.patch + column % a.grid.patch) * a.grid",
            "column % a.grid.patch",
        ),
    ),
    "unpatchify's channel ignored": (FINAL, "a.grid.channels + «channel»;", "0"),
    "sample of the tokens dropped": (FINAL, "load_one(a.tokens, «sample», token, value)", "0"),
    "sample of the gathered image dropped": (FINAL, "load_one(a.image, «sample», channel", "0"),
    # ------------------------------------------------------------------------------------------------ bias_gelu
    "half the steepness": (GELU, "steep = «2.0f» * ROOT", "1.0f"),
    "cube forgotten": (GELU, "ROOT * z * (1.0f + KAPPA * «z * z»)", "z"),
    "signs of the tails swapped": (GELU, "«steep >= 0.0f» ? nearer", "steep < 0.0f"),
    "bend of one sigma": (GELU, "nearer : farther, «nearer * farther»}", "farther"),
    "bias ignored forward": (*(GELU, "rows[r].at[i] + «bias.at[i]»;", "0.0f"),),
    "bias ignored backward": (GELU, "x[r].at[i] + «bias.at[i]»;", "0.0f"),
    "slope of the cube once": (GELU, "(1.0f + «3.0f» * KAPPA", "1.0f"),
    "bend without z": (GELU, "s.sigma + «z» * s.bend", "1.0f"),
    "sum before the slope": (GELU, "total.at[i] += «dy[r].at[i]»;", "dy[r].at[i] / slope"),
    "sample of the forward dropped": (GELU, "load<WIDE>(a.x, «sample», first + r", "0"),
    "sample of the gradient dropped": (GELU, "load<WIDE>(a.dy, «sample», first", "0"),
    "a chunk runs into the next": (GELU, "«first + a.chunk_rows < a.length» ? a.chunk_rows", "true"),
    "samples joined across gaps": (
        GELU,
        "if («t.has_value() && t->stride(0) != length * t->stride(1)») return",
        "false",
    ),
    # ------------------------------------------------------------------------------------------------ adamw_ema
    "steps counted from 0": (ADAMW, "static_cast<double>(before + «1.0f»);", "0.0f"),
    "correction of the first moment lost": (ADAMW, "a.lr / (1.0 - «pow(a.beta1, t)»)", "0.0"),
    "correction of the second moment in fp32": (
        ADAMW,
        "sqrt(1.0 - «pow(a.beta2, t)»)",
        "static_cast<float>(pow(a.beta2, t))",
    ),
    "a skipped step counted": (ADAMW, "store_one(step, 0, 0, 0, «skipped» ?", "false"),
    "steps of another launch": (ADAMW, "const int64_t row = «a.first_row + index»;", "index"),
    "chunks of the first weight": (
        ADAMW,
        "if («first_chunks[weight + apart] <= static_cast<int>(blockIdx.x)»)",
        "false",
    ),
    "every chunk is the first": (ADAMW, "tensor.token = «CHUNK»;", "0"),
    "chunks not counted from the weight's first": (
        ADAMW,
        "static_cast<int>(blockIdx.x) - «a.first_chunks[weight]»;",
        "0",
    ),
    "a chunk runs past the weight": (ADAMW, "left < CHUNK ? «left» : CHUNK", "CHUNK"),
    "a chunk runs into the next of its weight": (ADAMW, "left < CHUNK ? left : «CHUNK»);", "left"),
    "step size of another weight": (ADAMW, "load_one(a.factors, 0, «a.first_row + weight», 0)", "0"),
    "root of another weight": (ADAMW, "load_one(a.factors, 0, «a.first_row + weight», 1)", "0"),
    "factors of another launch": (ADAMW, "a.first_row = static_cast<int>(«first»);\n  by_layout", "0"),
    "gradient not divided": (ADAMW, "gradient.at[i] / «scale»;", "1.0f"),
    "gradient not squared": (ADAMW, "a.complement2 * («g * g»)", "g"),
    "moment not decayed": (ADAMW, "a.complement1 * («g - m.at[i]»)", "g"),
    "root forgotten": (ADAMW, "sqrtf(new_v) / «root» + a.eps", "1.0f"),
    "eps lost": (ADAMW, "/ root + «a.eps»;", "0.0f"),
    "no weight decay": (ADAMW, "new_w = «a.shrink» * w", "1.0f"),
    "old moment used": (ADAMW, "step_size * («new_m» /", "m.at[i]"),
    "weight changed by a skipped step": (ADAMW, "w.at[i] = «skipped» ?", "false"),
    "moment changed by a skipped step": (ADAMW, "m.at[i] = «skipped» ?", "false"),
    "second moment changed by a skipped step": (ADAMW, "v.at[i] = «skipped» ?", "false"),
    "average forgotten": (ADAMW, "(w.at[i] - «average.at[i]»);", "0.0f"),
    "average left by a skipped step": (
        ADAMW,
        "average.at[i] += «a.towards» *",
        "(skipped ? 0.0f : a.towards)",
    ),
    "copy of the moment": (ADAMW, "store<WIDE>(copies, 0, chunk, column, width, «w»);", "m"),
    "averages not written": (ADAMW, "if («averages.data != nullptr») store", "false"),
    "betas swapped": (ADAMW, "a.complement1 = static_cast<float>(1.0 - «step.beta1»)", "step.beta2"),
    "decay in place of its complement": (
        ADAMW,
        "a.towards = static_cast<float>(«1.0 - step.decay»)",
        "step.decay",
    ),
    "weights of the first launch": (ADAMW, "step.order[«first + i»];\n    const Tensor& own", "i"),
    "steps of the first launch": (ADAMW, "step.order[«first + i»];\n    const int id", "i"),
    # ------------------------------------------------------------------------------------------------ split_qkv
    "head's stride forgotten": (QKV, "shifted(a.dk, inside ? head * «a.dk_apart» : 0)", "a.head_dim"),
    "every head is the first": (QKV, "const int head = «unit / a.units»,", "0"),
    "a unit is the first of its head": (QKV, "column = «unit % a.units» * UNIT;", "0"),
    "units beyond the last head": (QKV, "const bool inside = «head < a.heads»;", "true"),
    "a unit written over the next head": (QKV, "end = «(head + 1)» * a.head_dim;", "(head + 2)"),
    "every part in one place": (QKV, "«p * width» + to, p * width + end", "0"),
    "a chunk of qkv runs into the next": (
        *(QKV, "int>(«first + a.chunk_rows < a.length» ? a.chunk_rows", "true"),
    ),
    "sample of a part dropped": (QKV, "load<WIDE>(from[3 - PARTS + p], «sample», first", "0"),
    "sample of the packed rows dropped": (QKV, "store<WIDE>(a.dpacked, «sample», first", "0"),
    "every chunk of qkv is the first": (QKV, "first = «chunk % a.chunks» * a.chunk_rows", "0"),
    "dk for dq": (QKV, "from[0] = «shifted(a.dq, inside ? head * a.dq_apart : 0)»;", "from[1]"),
    "half the rows of a warp in the sum": (
        *(QKV, "+ «__shfl_xor_sync(EVERY_LANE, total[p].at[i], UNITS)»;", "0.0f"),
    ),
    "one warp in the sum": (QKV, "sums.read((«warp» * PARTS + p)", "0"),
    "one part in the sum": (QKV, "sums.read((warp * PARTS + «p»)", "0"),
    "one channel in the sum": (QKV, "SUMS_OF_A_PART + «channel» * UNITS + mine)", "0"),
    "a sum beside its place": (QKV, "chunk, «p» * width + to + channel, sum", "0"),
    "sum of the last rows alone": (
        *(QKV, "total[p].at[i] += «held[r][p].at[i]»;", "held[r][p].at[i] - total[p].at[i]"),
    ),
    "heads with gaps taken as one": (
        *(
            QKV,
            "heads = heads && («shape.heads == 1 || t->stride(2) == shape.head_dim * t->stride(3)»);",
            "true",
        ),
    ),
    "one part's heads decide": (QKV, "heads = «heads» && (shape.heads == 1", "true"),
    "samples of qkv joined across gaps": (
        *(QKV, "samples = «samples && t->stride(0) == shape.length * t->stride(1)»;", "true"),
    ),
    # ------------------------------------------------------------------------------------------------ mlp
    "weight taken as it lies": (MLP, "DESC_TRANSA, «product.transposed» ? CUBLAS_OP_T", "false"),
    "weight's layout turned": (
        MLP,
        "type(), «product.transposed» ? depth : columns, product",
        "!product.transposed",
    ),
    "rows for columns": (MLP, "const Layout b(op, product.type(), «depth», product.rows())", "columns"),
    "stride of z": (MLP, "DESC_EPILOGUE_AUX_LD, «product.columns()»);", "product.depth()"),
    "kept without the bias": (
        *(
            MLP,
            "{CUBLASLT_EPILOGUE_GELU_AUX, «CUBLASLT_EPILOGUE_GELU_AUX_BIAS»}",
            "CUBLASLT_EPILOGUE_GELU_AUX",
        ),
    ),
    "no GELU where nothing is kept": (
        *(MLP, "{CUBLASLT_EPILOGUE_GELU, «CUBLASLT_EPILOGUE_GELU_BIAS»}", "CUBLASLT_EPILOGUE_BIAS"),
    ),
    "z not kept": (MLP, "«keep» ? &z : nullptr", "false"),
    "dh for dz": (
        *(
            MLP,
            "biased ? «CUBLASLT_EPILOGUE_DGELU_BGRAD» : CUBLASLT_EPILOGUE_DGELU",
            "CUBLASLT_EPILOGUE_DEFAULT",
        ),
    ),
    "bias' gradient not asked for": (MLP, "CUBLASLT_EPILOGUE_DGELU, «biased» ? &dbias : nullptr", "false"),
    "added to what was there": (MLP, "one = 1.0f, zero = «0.0f»;", "1.0f"),
    "sums in 16 bits": (
        *(MLP, "CUBLASLT_REDUCTION_SCHEME_NONE | «CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE»", "4"),
    ),
    "alignment of the weight promised": (
        MLP,
        "ALIGNMENT_A_BYTES, «alignment(product.weight.data_ptr())»);",
        "uint32_t{256}",
    ),
    "alignment of x promised": (
        MLP,
        "ALIGNMENT_B_BYTES, «alignment(product.left.data_ptr())»);",
        "uint32_t{256}",
    ),
    "one choice for all lengths": (MLP, "device,\n      «product.rows()»,", "0"),
    "one choice for all widths": (MLP, "product.rows(),\n      «product.columns()»,", "0"),
    "one choice for all depths": (MLP, "      «product.depth()» * 2 + product", "0"),
    "one choice for both dtypes": (MLP, "      «product.type()»,\n", "CUDA_R_16F"),
    "one choice for all alignments of the weight": (MLP, "      «of(&product.weight)»,\n", "int64_t{0}"),
    "one choice for all alignments of x": (MLP, "      «of(&product.left)»,\n", "int64_t{0}"),
    "no rows, no zeros": (MLP, "new_zeros(z, {«biased» ? z.size(1) : 0})", "false"),
}


def mutated() -> dict[str, str]:
    """The sources with every fault planted, each behind its number, and nothing but the general path."""
    texts = emulated_cuda.sources()
    choices: dict[tuple[str, int, int], str] = {}
    for number, (name, (file, place, faulty)) in enumerate(MUTANTS.items(), 1):
        before, expression, after = re.split("[«»]", place)
        assert texts[file].count(before + expression + after) == 1, f"{name}: {place!r} is not once in {file}"
        start = texts[file].index(before + expression + after) + len(before)
        span = (file, start, start + len(expression))
        choices[span] = f"emulation::mutant == {number} ? {faulty} : {choices.get(span, expression)}"
    for (file, start, end), choice in sorted(choices.items(), reverse=True):
        texts[file] = f"{texts[file][:start]}({choice}){texts[file][end:]}"
    only_general = "if (!wide) return body(Any{}, Any{}, std::false_type{});"
    assert only_general in texts[COMMON]
    a, b = texts[COMMON].split(only_general)
    texts[COMMON] = (
        a
        + only_general.replace("if (!wide) return ", "(void)stream, (void)branch, (void)wide;\n  ")
        + b[b.index("}\n") :]
    )
    return texts


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[object]:
    with emulated_cuda.running(emulated_cuda.load(emulated_cuda.build(mutated()))) as module:
        yield module
        module.mutate(0)


@pytest.fixture(autouse=True)
def _on_cuda():
    with registry.use_backend("cuda"):
        yield


def check_adaln() -> None:
    """A masked tail, several chunks, rows that fill no block, every vector, an eps that matters, two samples and many."""
    assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", 2, 21, 23, F32, F32), eps=0.1)
    assert_parity("modulate_norm", make_inputs("modulate_norm", 2, 3, 384, F32, F32), eps=0.1)
    assert_parity("modulate_norm", make_inputs("modulate_norm", 19, 2, 40, F32, F32), eps=0.1)
    x, branch = (torch.randn(2, 3, 96) for _ in range(2))
    x1, _, mean, _ = torch.ops.ditkernels.gated_residual_norm_cuda(
        x.to(BF16), branch, *[None] * 6, "layernorm", 1e-6, F32
    )
    torch.testing.assert_close(mean, x1.float().mean(-1))


def check_embed_without_positions() -> None:
    inputs = test_patch_embed.make_inputs(2, (3, 2), 12, 2)
    test_patch_embed.assert_parity({n: v for n, v in inputs.items() if n != "pos_embed"})


def check_embed_of_many_lines() -> None:
    """So many that a block takes several tiles of channels."""
    x, weight = torch.randn(1 << 15, 1, 1, 1), torch.randn(130, 1, 1, 1)
    torch.testing.assert_close(patch_embed(x, weight)[:, 0], x[:, 0, 0] * weight[:, 0, 0, 0], rtol=0, atol=0)


def check_final_layer_over_several_chunks() -> None:
    inputs = test_final_layer.make_inputs(2, (10, 13), 16, 2)
    test_final_layer.assert_parity(inputs, grid=(10, 13), patch_size=2)


def check_rows_are_rounded() -> None:
    """With an identity for weight the image shows the rows."""
    x, weight = torch.randn(1, 2, 32), torch.eye(32, dtype=BF16)
    rows = final_layer(x, None, None, weight, grid=(1, 2), patch_size=1, out_dtype=F32)
    torch.testing.assert_close(rows, rows.to(BF16).float(), rtol=0, atol=0)


def check_bias_gelu() -> None:
    """Several chunks in samples with gaps between them, a masked unit, and a cotangent that lies otherwise."""
    inputs = test_bias_gelu.make_inputs((2, 70, 13), F32, F32, "samples apart")
    test_bias_gelu.assert_parity(inputs, cotangent="tokens first")


def check_adamw() -> None:
    """Weights of one chunk and of two, no two numbers alike; a step that is skipped; more weights than a launch takes."""
    shapes = ((3, 7), (3, 2733), (0,), (5,))
    numbers = {"grad_scale": torch.tensor(0.7), "found_inf": torch.tensor(0.0), "eps": 0.1}
    test_adamw_ema.assert_parity(test_adamw_ema.make_state(shapes=shapes), **numbers)
    test_adamw_ema.check_first_and_late_steps()
    test_adamw_ema.check_skipped_step(shapes=((3, 7),))
    test_adamw_ema.assert_parity(test_adamw_ema.make_state(shapes=((3,),) * 450))


def check_qkv() -> None:
    """Strides of its own for each part, heads and samples with gaps between them, masked units, several chunks."""
    for layout in ("each its own", "heads first", "samples apart", "packed"):
        test_qkv.assert_parity(test_qkv.gradients((2, 70, 3, 2, 13), F32, layout))


LENGTHS = itertools.count(3)


def check_mlp() -> None:
    """Of a length that no algorithm has been chosen for yet; then of other alignments, lengths, widths, dtypes, and no rows."""
    length = next(LENGTHS)
    shape = (1, length, 16, 24, 8)
    inputs = test_mlp.make_inputs(shape, BF16)
    test_mlp.assert_parity(inputs)
    for name in ("x", "fc1_weight"):
        test_mlp.assert_parity({**inputs, name: misaligned(inputs[name])})
    for other in (
        (1, length + 1000, 16, 24, 8),
        (1, length, 16, 40, 8),
        (1, length, 24, 24, 16),
        (1, 0, 16, 24, 8),
    ):
        test_mlp.assert_parity(test_mlp.make_inputs(other, BF16))
    test_mlp.assert_parity(test_mlp.make_inputs(shape, F16))
    test_mlp.assert_parity(test_mlp.make_inputs(shape, BF16, biased=False))
    with torch.no_grad():
        exact = reference.mlp(**{name: v.double() for name, v in inputs.items()})
        assert_contract(mlp(**inputs), reference.mlp(**inputs), exact)


def misaligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that begins 16 bytes behind a multiple of 256."""
    room = torch.empty(tensor.numel() + 256, dtype=tensor.dtype)
    start = (-room.data_ptr() % 256 + 16) // 2
    return room[start : start + tensor.numel()].view_as(tensor).copy_(tensor)


FAMILIES = {
    MLP: (check_mlp,),
    ADALN: (check_adaln,),
    GELU: (check_bias_gelu,),
    QKV: (check_qkv,),
    ADAMW: (check_adamw,),
    EMBED: (check_patch_embed, check_embed_without_positions, check_embed_of_many_lines),
    **dict.fromkeys(
        (FINAL, FINAL_BACKWARD, FINAL_SHARED),
        (check_final_layer, check_final_layer_over_several_chunks, check_rows_are_rounded),
    ),
}
ALL = tuple(dict.fromkeys(itertools.chain(*FAMILIES.values())))


def run_checks(file: str) -> None:
    """Those of the file's family, or all for what the families share."""
    for check in FAMILIES.get(file, ALL):
        check()


def test_the_kernels_as_they_are_pass() -> None:
    run_checks(COMMON)


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(emulation, name: str) -> None:
    emulation.mutate(list(MUTANTS).index(name) + 1)
    try:
        with pytest.raises((AssertionError, RuntimeError)) as caught:
            run_checks(MUTANTS[name][0])
    finally:
        emulation.mutate(0)
    words = (
        "contract",
        "out of bounds",
        "not finite",
        "not close",
        "not equal",
        "nobody wrote",
        "absent",
        "cuBLASLt",
        "invalid gradient",
    )
    assert any(word in str(caught.value) for word in words), str(caught.value)
