"""Every planted fault in the CUDA sources is found by the parity checks or by the emulation itself.

All faults stand in one build: «expression» in the source becomes a choice, made at run time, between itself and the faulty one.
Only the general path is compiled, which is the same code at dtypes known at run time and element accesses.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import pytest
import torch

from ditkernels import reference
from ditkernels.ops import dispatch
from ditkernels.ops.image import PATCHIFY, UNPATCHIFY, final_layer, patch_embed
from ditkernels.ops.mlp import mlp
from ditkernels.ops.spec import encoded
from tests.numerics import assert_contract
from tests.ops import (
    test_adamw_ema,
    test_bias_gelu,
    test_branch_norm,
    test_constant_rows,
    test_final_layer,
    test_mlp,
    test_modulations,
    test_patch_embed,
    test_qkv,
)
from tests.ops.test_adaln import BF16, F16, F32, assert_parity, make_inputs
from tests.ops.test_adaln_cuda import WANTED, check_what_is_wanted
from tests.ops.test_mlp_cuda import EPILOGUES, check_a_lack_of_algorithms
from tests.ops.triton_proof.patches_mutants import check_final_layer, check_patch_embed
from tools.kernel_proof import emulated_cuda

COMMON, PRODUCTS, SUMS = "common.cuh", "products.cuh", "sums.cuh"
NORM, IMAGE, GELU, ADAMW, MLP, QKV = "norm.cu", "image.cu", "gelu.cu", "optimizer.cu", "mlp.cu", "qkv.cu"

# By name: the file, a place in it that occurs once with the expression marked, and what takes the expression's place.
MUTANTS = {
    # ------------------------------------------------------------------------------------------------ norm
    "gate zeroed": (NORM, "row[r].at[i] + «gate.at[i]» * (u", "0.0f"),
    "branch bias ignored": (NORM, "(u[r].at[i] + «branch_bias.at[i]»)", "0.0f"),
    "stream not rounded": (NORM, "row[r].at[i] = «rounded<T>(value, a.x.dtype)»;", "value"),
    "mean forgotten": (NORM, "? row[r].at[i] - «apart» : 0.0f", "0.0f"),
    "mean as it was rounded": (NORM, "turn < «2»", "1"),
    "a variance that overflows taken for infinite": (NORM, "(«a.centred» ? 0.0f * sums[r]", "false"),
    "column mask of the squares dropped": (NORM, "«column + i < width» ? row[r].at[i] - apart", "true"),
    "eps dropped": (NORM, "sqrtf(sums[r] / width + «a.eps»)", "0.0f"),
    "eps divided by D": (NORM, "sqrtf(sums[r] / width + «a.eps»)", "a.eps / width"),
    "eps outside the root": (  # sqrt(v) + eps = sqrt(v + 2 eps sqrt(v) + eps²)
        *(NORM, "sqrtf(sums[r] / width + «a.eps»)", "a.eps * (2.0f * sqrtf(sums[r] / width) + a.eps)"),
    ),
    "weight ignored": (NORM, "row[r].at[i] * rstd * «weight.at[i]» +", "1.0f"),
    "bias after the modulation": (NORM, "rstd * weight.at[i] + «bias.at[i]»;", "0.0f"),
    "scale without the one": (NORM, "affine * («1.0f» + scale.at[i])", "0.0f"),
    "shift and scale swapped": (
        *(
            NORM,
            "load<VECTORISED>(«vectors.scale», sample, column, width, 0.0f);\n    const Unit shift",
            "vectors.shift",
        ),
    ),
    "shift ignored": (NORM, "(1.0f + scale.at[i]) + «shift.at[i]»;", "0.0f"),
    "batch index of x dropped": (NORM, "load<VECTORISED>(a.x, «sample», first + r", "0"),
    "batch index of the branch dropped": (NORM, "load<VECTORISED>(a.branch, «sample», first + r", "0"),
    "batch index of the gate dropped": (
        NORM,
        "const Unit gate = load<VECTORISED>(vectors.gate, «sample», column",
        "0",
    ),
    "batch index of the shift dropped": (NORM, "load<VECTORISED>(vectors.shift, «sample», column", "0"),
    "batch index of h dropped": (NORM, "store<VECTORISED>(a.h, «sample», first + r", "0"),
    "factor without the one": (NORM, "factor.at[i] *= «1.0f» + scale.at[i]", "0.0f"),
    "batch index of dh dropped": (NORM, "dnormed[k] = load<VECTORISED>(a.dh, «sample», token", "0"),
    "batch index of dx1 dropped": (NORM, "load<VECTORISED>(a.dx1, «sample», token", "0"),
    "stream's gradient lost": (NORM, "if («!NORM || a.dx1.data != nullptr») stream[k] = load", "false"),
    "P after the factor": (NORM, "p.at[i] += «dnormed[k].at[i]»;", "dnormed[k].at[i] * factor.at[i]"),
    "Q without x̂": (NORM, "q.at[i] += «dnormed[k].at[i] * normed[k].at[i]»;", "dnormed[k].at[i]"),
    "R lost": (NORM, "r.at[i] += «stream[k].at[i] * u[k].at[i]»;", "0.0f"),
    "S lost": (NORM, "s.at[i] += «BY == By::TOKEN ? dbranch.at[i] : stream[k].at[i]»;", "0.0f"),
    "factor forgotten in dx̂": (NORM, "dnormed[k].at[i] *= «factor.at[i]»;", "1.0f"),
    "mean of dx̂ not subtracted": (NORM, "(dnormed[k].at[i] - «along_mean» - ", "0.0f"),
    "x̂'s share not subtracted": (NORM, "normed[k].at[i] * «along_normed»);", "0.0f"),
    "rstd forgotten in dx": (NORM, "stream[k].at[i] += «rstd[k]» *", "1.0f"),
    "dbranch without the gate": (NORM, "dbranch.at[i] = «gate.at[i]» *", "1.0f"),
    "every chunk starts at the first": (*(NORM, "first = «blockIdx.x % a.chunks * a.chunk_rows»;", "int64_t{0}"),),
    "the last chunk runs on": (
        NORM,
        "first + a.chunk_rows < «a.length» ? a.chunk_rows",
        "a.length + a.chunk_rows",
    ),
    "one chunk's rows lost": (NORM, "for (int start = «0»; start < count", "ROWS"),
    "one chunk's sums lost": (NORM, "for (int64_t chunk = «0»; chunk", "1"),
    "P and Q swapped": (NORM, "p += load_one(a.partial, sample, «chunk * SUMS», column)", "chunk * SUMS + 1"),
    "bias forgotten in dscale": (NORM, "«load_one(a.vectors.bias, 0, column, 0.0f)» * p", "0.0f"),
    "weight forgotten in dscale": (NORM, "«load_one(a.vectors.weight, 0, column, 1.0f)» * q", "1.0f"),
    "branch bias forgotten in dgate": (
        NORM,
        "«load_one(a.vectors.branch_bias, 0, column, 0.0f)» * s",
        "0.0f",
    ),
    "modulation without the one": (NORM, "modulation = «1.0f» + load_one", "0.0f"),
    "batch index of the sums' scale dropped": (
        NORM,
        "load_one(a.vectors.scale, «sample», column, 0.0f)",
        "0",
    ),
    "scale forgotten in dweight": (NORM, "sample, 0, column, «modulation» * q", "1.0f"),
    "scale forgotten in dbias": (NORM, "sample, 1, column, «modulation» * p", "1.0f"),
    "gate forgotten in dbranch_bias": (NORM, "«load_one(a.vectors.gate, sample, column, 1.0f)» * s", "1.0f"),
    "one sample's terms lost": (*(NORM, "for (int64_t sample = «threadIdx.x / WARP»; sample", "1 + threadIdx.x / WARP"),),
    "samples added twice": (NORM, "sample < batch; sample += «GROUP_WARPS»", "1"),
    "samples beyond the first round lost": (NORM, "sample < batch; sample += «GROUP_WARPS»)", "a.batch"),
    "mean kept beside its place": (NORM, "store_one(a.stats, sample, first + r, «0», means[r])", "1"),
    "rstd kept in the mean's place": (NORM, "first + r, «a.centred ? 1 : 0», rstd", "0"),
    "statistics of one sample": (NORM, "store_one(a.stats, «sample», first + r, a.centred", "0"),
    "statistics without a place": (NORM, "keeps = threadIdx.x == 0 && «a.stats.data != nullptr»;", "true"),
    "mean forgotten in the backward": (NORM, "(normed[k].at[i] - «mean[k]») * rstd[k];", "0.0f"),
    "rstd read in the mean's place": (NORM, "load_one(a.stats, sample, token, «a.centred ? 1 : 0»)", "0"),
    "rows without their sums": (NORM, "if («a.beyond_norm») block_sums(sums", "a.dx.data != nullptr"),
    "a branch that is absent read": (NORM, "if («a.branch.data != nullptr») u[k]", "true"),
    "a dx that is not wanted written": (NORM, "if («a.dx.data != nullptr») store", "true"),
    "a dbranch that is not wanted written": (NORM, "if («a.dbranch.data != nullptr») store", "true"),
    "sums of the norm alone": (NORM, "if (RESIDUAL && «a.residual_sums»)", "a.norm_sums && a.residual_sums"),
    "sums of the residual alone": (NORM, "if (NORM && «a.norm_sums»)", "a.norm_sums && a.residual_sums"),
    "terms that are not wanted written": (NORM, "if («a.terms.data == nullptr») return;", "false"),
    "dx1 read for the norm's vectors": (NORM, "if (NORM && «!beyond_norm») t.dx1", "false"),
    "branch read without dgate": (NORM, "if («!of_branch») t.branch", "false"),
    "gradients in x's dtype": (
        COMMON,
        "shape, «static_cast<ScalarType>(wanted[at])»);",
        "like.scalar_type()",
    ),
    # ------------------------------------------------------------------------------------------------ norm, by token
    "a token's row dropped": (NORM, "row_of(vectors, «first»)", "0"),
    "index ignored": (NORM, "load_number(a.index, «sample * a.length + first»)", "0"),
    "sample of the index dropped": (NORM, "load_number(a.index, «sample * a.length + first»)", "first"),
    "one sample's tokens for all groups": (NORM, "BY == By::INDEX ? «group / a.rows» : group", "int64_t{0}"),
    "a row's first token lost": (
        NORM,
        "first = «begin + blockIdx.x % a.chunks * share»;",
        "begin + 1 + blockIdx.x % a.chunks * share",
    ),
    "shares that do not reach the end": (NORM, "share = «ceil_div(end - begin, a.chunks)»;", "(end - begin) / a.chunks"),
    "order ignored": (NORM, "load_number(a.order, «sample * a.length + place»)", "sample * a.length"),
    "order of another sample": (NORM, "load_number(a.order, «sample * a.length + place»)", "place"),
    "starts of another sample": (NORM, "at = «sample * (a.rows + 1)» + group % a.rows;", "int64_t{0}"),
    "starts of another row": (NORM, "(a.rows + 1) + «group % a.rows»;", "int64_t{0}"),
    "sums of a sample in the place of a row's": (NORM, "store<VECTORISED>(a.partial, «group», chunk, column, width, p)", "sample"),
    "own vectors of another token": (NORM, "own = row_of(a.vectors, «first + start»);", "first"),
    "own dscale without x̂": (NORM, "dnormed[k].at[i] * («normed[k].at[i] * factor.at[i]» + unmodulated", "factor.at[i]"),
    "bias forgotten in own dscale": (NORM, "unmodulated = load<VECTORISED>(«own.bias», 0", "Vector{}"),
    "own scale without the one": (NORM, "dnormed[k].at[i] *= «1.0f» + scale.at[i];", "0.0f"),
    "branch bias forgotten in own dgate": (NORM, "Unit dgate = load<VECTORISED>(«a.vectors.branch_bias», 0", "Vector{}"),
    "own dgate lost": (NORM, "if («a.dgate.data != nullptr») store", "false"),
    "own dscale lost": (NORM, "if («a.dscale.data != nullptr») store", "false"),
    "own dshift lost": (NORM, "if («a.dshift.data != nullptr»)", "false"),
    "own gate forgotten in dbranch_bias": (
        *(NORM, "s.at[i] += «BY == By::TOKEN ? dbranch.at[i] : stream[k].at[i]»;", "stream[k].at[i]"),
    ),
    "vectors of one group for all": (NORM, "vector->sample = «vector->row»;", "0"),
    "rows of a vector in one place": (COMMON, "row * «vector.row» * bytes", "0"),
    "rows of fp32 as of half precision": (COMMON, "ScalarType::Float ? «sizeof(float)» : sizeof(BFloat16)", "sizeof(BFloat16)"),
    # ------------------------------------------------------------------------------------------------ norm, of the branch
    "branch's squares lost": (NORM, "squares[r] += «u[r].at[i] * u[r].at[i]»;", "1.0f"),
    "branch's eps dropped": (NORM, "sqrtf(squares[r] / width + «a.branch_eps»)", "0.0f"),
    "branch's statistics of one sample": (NORM, "store_one(a.branch_stats, «sample», first + r", "0"),
    "branch not normed": (NORM, "u[r].at[i] *= «rstd * weight.at[i]»;", "weight.at[i]"),
    "branch's weight ignored": (NORM, "u[r].at[i] *= «rstd * weight.at[i]»;", "rstd"),
    "branch's weight added": (NORM, "branch_bias = «BRANCH_NORM» ? Unit{}", "false"),
    "branch's weight forgotten in dbranch": (NORM, "gate.at[i] *= «weight.at[i]»;", "1.0f"),
    "branch's statistics of another row": (NORM, "load_one(a.branch_stats, sample, «token_at(first + start + k)», 0)", "0"),
    "branch's statistics of another sample": (NORM, "load_one(a.branch_stats, «sample», token_at", "0"),
    "b̂ not normed": (NORM, "u[k].at[i] *= «branch_rstd[k]»;", "1.0f"),
    "gate forgotten along b̂": (NORM, "along_branch[k] += «gate.at[i]» * stream", "1.0f"),
    "b̂'s share not subtracted": (NORM, "- «u[k].at[i]» * (along_branch[k] / width)", "0.0f"),
    "b̂'s share not divided": (NORM, "u[k].at[i] * («along_branch[k] / width»)", "along_branch[k]"),
    "r forgotten in dbranch": (NORM, "dbranch.at[i] = «branch_rstd[k]» * through", "1.0f"),
    "T without b̂": (NORM, "s.at[i] += «u[k].at[i] * stream[k].at[i]»;", "stream[k].at[i]"),
    "T without a weight lost": (NORM, "r.at[i] = «a.branch_weighted» ? r.at[i]", "true"),
    "T with a weight twice": (NORM, "r.at[i] = «a.branch_weighted» ? r.at[i]", "false"),
    "branch_weight's gradient alone not made": (NORM, "|| wanted[2] >= 0 || «wanted[5] >= 0»;", "false"),
    # ------------------------------------------------------------------------------------------------ sums
    "one term for all": (SUMS, "parts.write(«i * GROUP_THREADS» + threadIdx.x", "0"),
    "one group lost": (SUMS, "for (int64_t group = «threadIdx.x / WARP»; group", "1 + threadIdx.x / WARP"),
    "groups added twice": (SUMS, "group < groups; group += «GROUP_WARPS»", "1"),
    "one warp's groups lost": (SUMS, "for (int warp = «1»; warp < GROUP_WARPS", "2"),
    "one warp's groups for all": (SUMS, "parts.read(i * GROUP_THREADS + «warp * WARP» + threadIdx.x)", "0"),
    # ------------------------------------------------------------------------------------------------ products
    "one lane's sums lost": (NORM, "for (int warp = «0»; warp < warps", "1"),
    "a quarter of the summands lost": (PRODUCTS, "for (int quarter = «0»; quarter", "1"),
    "even and odd columns swapped": (PRODUCTS, "sums[j][0] += above.at[i] * «even.at[i]»;", "odd.at[i]"),
    "rows of a tile swapped": (PRODUCTS, "sums[j][2] += «below.at[i]» *", "above.at[i]"),
    "columns dealt out wrongly": (
        PRODUCTS,
        "lane_row() / 2 * UNIT + «tile * 2 + lane_row() % 2»;",
        "tile + lane_row() % 2 * 4",
    ),
    "halves of a tile swapped": (PRODUCTS, "unit.at[i] = «half == 0» ? sums", "half != 0"),
    # ------------------------------------------------------------------------------------------------ image
    "channel of a value ignored": (IMAGE, "return {«channel», row * grid.patch", "0"),
    "a value's channel taken for its place": (
        *(IMAGE, "channel = CHANNELS_FIRST ? «value / area» : value", "value % grid.channels"),
    ),
    "channels first where they are last": (*(IMAGE, ": «value % grid.channels»;\n  const int within", "value / area"),),
    "row of the patch ignored": (IMAGE, "row * grid.patch + «within / grid.patch», column", "0"),
    "column of the patch ignored": (IMAGE, "column * grid.patch + «within % grid.patch»};", "0"),
    "rows and columns of the grid swapped": (
        IMAGE,
        "row = «token / grid.columns», column",
        "token % grid.columns",
    ),
    "unpatchify's row and column swapped": (*(IMAGE, "within = «row % p * p + column % p»;", "column % p * p + row % p"),),
    "unpatchify's channel ignored": (IMAGE, "within * a.grid.channels + «channel»;", "0"),
    "unpatchify's order of values ignored": (IMAGE, "value = «a.channels_first» ? channel", "false"),
    "sample of the tokens dropped": (IMAGE, "moved = load_one(a.tokens, «sample», row", "0"),
    "sample of the gathered image dropped": (IMAGE, "value, load_one(a.image, «sample», place));", "0"),
    "order of the gathered values ignored": (IMAGE, "place = «a.channels_first» ? place_of", "false"),
    "dtype of the gathered values ignored": (*(IMAGE, "grid_h * grid_w, values}, «dtype»);", "image_in.scalar_type()"),),
    "sample of a line ignored": (IMAGE, "value = load_one(a.image, «sample», place_of", "0"),
    "line mask dropped": (IMAGE, "const bool live = «start + row < a.lines»;", "true"),
    "bias of the embedding ignored": (IMAGE, "unit.at[i] += «bias.at[i]» + pos.at[i];", "0.0f"),
    "positions ignored": (IMAGE, "+= bias.at[i] + «pos.at[i]»;", "0.0f"),
    "positions of the line and not of the token": (*(IMAGE, "load<VECTORISED>(a.pos, 0, «line % a.length»", "line"),),
    "line mask of y dropped": (IMAGE, "if («line >= a.lines || column >= a.width») return;", "false"),
    "values beyond the first tile lost": (IMAGE, "for (int from = 0; from < «a.values»", "1"),
    "only the first slice of values": (IMAGE, "depth < VALUES && «from + depth < a.values»;", "depth < 1"),
    "column tiles beyond the first lost": (IMAGE, "column < «a.width»; column += a.parts", "1"),
    "last gate zeroed": (IMAGE, "unit.at[i] + «gate.at[i]» * (branch", "0.0f"),
    "last branch bias ignored": (IMAGE, "(branch.at[i] + «bias.at[i]»)", "0.0f"),
    "norm's weight ignored": (IMAGE, "affine = unit.at[i] * «weight.at[i]» + bias", "1.0f"),
    "norm's bias ignored": (IMAGE, "weight.at[i] + «bias.at[i]»;\n    unit", "0.0f"),
    "scale ignored": (IMAGE, "affine * (1.0f + «scale.at[i]») + shift", "0.0f"),
    "shift of the last layer ignored": (IMAGE, "+ scale.at[i]) + «shift.at[i]», a.weight", "0.0f"),
    "scale of the last layer without the one": (IMAGE, "affine * («1.0f» + scale.at[i]) + shift", "0.0f"),
    "batch index of the last shift dropped": (
        IMAGE,
        "load<VECTORISED>(a.vectors.shift, «sample», column",
        "0",
    ),
    "batch index of the last scale dropped": (
        IMAGE,
        "load<VECTORISED>(a.vectors.scale, «sample», column",
        "0",
    ),
    "batch index of the last gate dropped": (IMAGE, "load<VECTORISED>(a.vectors.gate, «sample», column", "0"),
    "last mean forgotten": (IMAGE, "? unit.at[k] - «mean» : 0.0f", "0.0f"),
    "rms taken for a variance": (IMAGE, "if («a.centred») {", "true"),
    "last mean as it was rounded": (IMAGE, "turn < «2»", "1"),
    "a last variance that overflows taken for infinite": (IMAGE, "(«a.centred» ? 0.0f * squares", "false"),
    "last column mask dropped": (IMAGE, "unit.at[k] = «own_column(i) + k < width» ? unit", "true"),
    "last eps dropped": (IMAGE, "squares / width + «a.eps»)", "0.0f"),
    "batch index of the last x dropped": (IMAGE, "Unit unit = load<VECTORISED>(a.x, «sample», token", "0"),
    "batch index of the last branch dropped": (IMAGE, "load<VECTORISED>(a.branch, «sample», token", "0"),
    "x1 of the last layer not rounded": (IMAGE, "bias.at[i]), «a.x.dtype»);", "ScalarType::Float"),
    "h not rounded": (IMAGE, "shift.at[i], «a.weight.dtype»);", "ScalarType::Float"),
    "bias of the linear ignored": (IMAGE, "float z = «load_one(a.bias, 0, at, 0.0f)»;", "0.0f"),
    "one warp's part lost": (IMAGE, "for (int part = «place / DEPTH»; part", "place / DEPTH + abreast"),
    "values beyond the first tiles lost": (IMAGE, "for (int start = 0; start < «tiles»; start", "1"),
    "row mask of the image dropped": (IMAGE, "row >= rows || «first + row >= a.length» ||", "false"),
    "batch index of the image dropped": (IMAGE, "store_one(a.out, «sample», place_of", "0"),
    # ------------------------------------------------------------------------------------------------ bias_gelu
    "half the argument": (GELU, "argument = «2.0f» * ROOT", "1.0f"),
    "cube forgotten": (GELU, "ROOT * z * (1.0f + KAPPA * «z * z»)", "z"),
    "signs of the tails swapped": (GELU, "«argument >= 0.0f» ? nearer", "argument < 0.0f"),
    "product of one sigma": (GELU, "nearer : farther, «nearer * farther»}", "farther"),
    "bias ignored forward": (*(GELU, "rows[r].at[i] + «bias.at[i]»;", "0.0f"),),
    "bias ignored backward": (GELU, "x[r].at[i] + «bias.at[i]»;", "0.0f"),
    "derivative of the cube once": (GELU, "(1.0f + «3.0f» * KAPPA", "1.0f"),
    "product without z": (GELU, "s.sigma + «z» * s.product", "1.0f"),
    "sum before the derivative": (GELU, "total.at[i] += «dy[r].at[i]»;", "dy[r].at[i] / derivative"),
    "sample of the forward dropped": (GELU, "load<VECTORISED>(a.x, «sample», first + r", "0"),
    "sample of the gradient dropped": (GELU, "load<VECTORISED>(a.dy, «sample», first", "0"),
    "a chunk runs into the next": (GELU, "«first + a.chunk_rows < a.length» ? a.chunk_rows", "true"),
    "a dx of gelu that is not wanted written": (GELU, "if («a.dx.data != nullptr») store", "true"),
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
    "copy of the moment": (ADAMW, "store<VECTORISED>(copies, 0, chunk, column, width, «w»);", "m"),
    "averages not written": (ADAMW, "if («averages.data != nullptr») store", "false"),
    "betas swapped": (ADAMW, "u.complement1 = static_cast<float>(1.0 - «beta1»)", "beta2"),
    "decay in place of its complement": (
        ADAMW,
        "u.towards = static_cast<float>(«1.0 - decay»)",
        "decay",
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
    "a chunk of qkv runs into the next": (*(QKV, "int>(«first + a.chunk_rows < a.length» ? a.chunk_rows", "true"),),
    "sample of a part dropped": (QKV, "load<VECTORISED>(from[3 - PARTS + p], «sample», first", "0"),
    "sample of the packed rows dropped": (QKV, "store<VECTORISED>(a.dpacked, «sample», first", "0"),
    "every chunk of qkv is the first": (QKV, "first = «chunk % a.chunks» * a.chunk_rows", "0"),
    "dk for dq": (QKV, "from[0] = «shifted(a.dq, inside ? head * a.dq_apart : 0)»;", "from[1]"),
    "half the rows of a warp in the sum": (*(QKV, "+ «__shfl_xor_sync(EVERY_LANE, total[p].at[i], UNITS)»;", "0.0f"),),
    "one warp in the sum": (QKV, "sums.read((«warp» * PARTS + p)", "0"),
    "one part in the sum": (QKV, "sums.read((warp * PARTS + «p»)", "0"),
    "one channel in the sum": (QKV, "SUMS_OF_A_PART + «channel» * UNITS + mine)", "0"),
    "a sum beside its place": (QKV, "chunk, «p» * width + to + channel, sum", "0"),
    "sum of the last rows alone": (*(QKV, "total[p].at[i] += «held[r][p].at[i]»;", "held[r][p].at[i] - total[p].at[i]"),),
    "heads with gaps taken as one": (
        *(
            QKV,
            "heads = heads && («shape.heads == 1 || t->stride(2) == shape.head_dim * t->stride(3)»);",
            "true",
        ),
    ),
    "one part's heads decide": (QKV, "heads = «heads» && (shape.heads == 1", "true"),
    "samples of qkv joined across gaps": (*(QKV, "samples = «samples && t->stride(0) == shape.length * t->stride(1)»;", "true"),),
    # ------------------------------------------------------------------------------------------------ mlp
    "weight taken as it lies": (MLP, "DESC_TRANSA, «p.transposed» ? CUBLAS_OP_T", "false"),
    "weight's layout transposed": (
        MLP,
        "make_layout(p.op, p.type, «p.transposed» ? p.depth",
        "!p.transposed",
    ),
    "rows for columns": (MLP, "make_layout(p.op, p.type, «p.depth», p.rows)", "p.columns"),
    "stride of z": (MLP, "DESC_EPILOGUE_AUX_LD, «p.columns»);", "p.depth"),
    "kept without the bias": (*(MLP, "biased ? «CUBLASLT_EPILOGUE_GELU_AUX_BIAS» :", "CUBLASLT_EPILOGUE_GELU_AUX"),),
    "no GELU where nothing is kept": (*(MLP, "biased ? «CUBLASLT_EPILOGUE_GELU_BIAS» :", "CUBLASLT_EPILOGUE_BIAS"),),
    "z not kept": (MLP, "h.data_ptr(), address(bias), «address(z)»}", "nullptr"),
    "dh for dz": (*(MLP, "biased ? «CUBLASLT_EPILOGUE_DGELU_BGRAD» :", "CUBLASLT_EPILOGUE_DEFAULT"),),
    "bias' gradient not asked for": (MLP, "dz.data_ptr(), «address(dbias)», z", "nullptr"),
    "added to what was there": (MLP, "one = 1.0f, zero = «0.0f»;", "1.0f"),
    "sums in 16 bits": (*(MLP, "CUBLASLT_REDUCTION_SCHEME_NONE | «CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE»", "4"),),
    "alignment of the weight promised": (*(MLP, "ALIGNMENT_A_BYTES, «alignment(product.weight)»);", "uint32_t{256}"),),
    "alignment of x promised": (MLP, "ALIGNMENT_B_BYTES, «alignment(product.left)»);", "uint32_t{256}"),
    "an operand taken wherever it begins": (MLP, "const Tensor taken = «aligned» ? tensor", "true"),
    "one choice for all lengths": (MLP, "return {device,           «product.rows»,", "0"),
    "one choice for all widths": (MLP, "          «product.columns»,  product.depth", "0"),
    "one choice for all depths": (MLP, "«product.depth» * 2 + product", "0"),
    "one choice for both dtypes": (MLP, "          «product.type»,     product", "CUDA_R_16F"),
    "one choice for all alignments of the weight": (
        MLP,
        "of(product.left), «of(product.weight)»,",
        "int64_t{0}",
    ),
    "one choice for all alignments of x": (MLP, "          «of(product.left)», of", "int64_t{0}"),
    "no rows, no zeros": (MLP, "new_zeros(z, {«biased» ? z.size(1) : 0})", "false"),
    "an algorithm said to be there": (MLP, "if (lacks(forward)) return «no_algorithm(forward)»;", '""'),
    "no algorithm for the backward": (MLP, "if (lacks(backward)) return «no_algorithm(backward)»;", '""'),
    "no algorithm without the bias": (MLP, "for (bool biased : {true, «false»})", "true"),
    "no algorithm where nothing is kept": (MLP, "for (bool keep : {true, «false»})", "true"),
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
    only_general = "if (!vectorised) return body(Any{}, Any{}, std::false_type{});"
    assert only_general in texts[COMMON]
    a, b = texts[COMMON].split(only_general)
    texts[COMMON] = (
        a
        + only_general.replace("if (!vectorised) return ", "(void)stream, (void)branch, (void)vectorised;\n  ")
        + b[b.index("}\n") :]
    )
    return texts


@cache
def build_of_mutants() -> ModuleType:
    return emulated_cuda.load(emulated_cuda.build(mutated()))


@pytest.fixture(autouse=True)
def emulation() -> Iterator[ModuleType]:
    with emulated_cuda.running(build_of_mutants()) as module:
        yield module
        module.mutate(0)


def check_norm() -> None:
    """A masked tail, several chunks, rows that fill no block, every vector, an eps that matters, two samples and many."""
    assert_parity("gated_residual_norm", make_inputs("gated_residual_norm", 2, 21, 23, F32, F32), eps=0.1)
    assert_parity("modulate_norm", make_inputs("modulate_norm", 2, 3, 384, F32, F32), eps=0.1)
    inputs = make_inputs("modulate_norm", 19, 2, 40, F32, F32)
    assert_parity("modulate_norm", inputs, eps=0.1, norm="rmsnorm")
    assert_parity("gated_residual", make_inputs("gated_residual", 2, 5, 23, F32, F32))
    x, branch = (torch.randn(2, 3, 96) for _ in range(2))
    made = [
        torch.ops.ditkernels.gated_residual_norm_cuda(x.to(BF16), branch, *[None] * 6, "layernorm", 1e-6, F32, keep)
        for keep in (True, False)
    ]
    for x1, _, stats in made[:1]:
        torch.testing.assert_close(stats[..., 0], x1.float().mean(-1))
    torch.testing.assert_close(made[0][1], made[1][1], rtol=0, atol=0)
    test_constant_rows.check("modulate_norm", 1152, F32, test_constant_rows.constant, 0.0)
    test_constant_rows.check_overflow("modulate_norm", 48, F32, compiled=True)


def check_by_token() -> None:
    """Vectors per token and by index: several chunks, rows of several tokens and of none, every vector, two samples."""
    for kind in ("tokens", "index of a sample"):
        inputs = test_modulations.make_inputs("gated_residual_norm", kind, 2, 5, 23, F32, F32)
        test_modulations.assert_parity("gated_residual_norm", inputs, eps=0.1)
        inputs = test_modulations.make_inputs("gated_residual", kind, 1, 61, 7, F32, F32)
        test_modulations.assert_parity("gated_residual", inputs)
    test_modulations.check_dshift_of_the_op()


def check_branch_norm() -> None:
    """Several samples and chunks, a masked unit, every vector, a gate alone, the gradient of the branch's weight alone."""
    inputs = test_branch_norm.make_inputs("gated_residual_norm", 2, 5, 23, F32, F32)
    for needs in ("", "branch_weight"):
        test_branch_norm.assert_parity("gated_residual_norm", inputs, needs)
    test_branch_norm.assert_parity("gated_residual", test_branch_norm.make_inputs("gated_residual", 2, 37, 23, F32, F32))
    test_branch_norm.assert_parity("gated_residual", test_branch_norm.make_inputs("gated_residual", 2, 3, 23, F32, F32, "gate"))


def check_wanted() -> None:
    """Each gradient is what it is among all, in its own dtype, and nothing is read or written that is not needed."""
    for case in WANTED:
        check_what_is_wanted(*case, 23, "layernorm", build_of_mutants())
    dy, x, bias = torch.randn(2, 70, 13), torch.randn(2, 70, 13), torch.randn(13)
    backward = torch.ops.ditkernels.bias_gelu_backward_cuda
    torch.testing.assert_close(backward(dy, x, bias, encoded((None, F32)))[1], backward(dy, x, bias, encoded((F32, F32)))[1])


def check_moves() -> None:
    """Both orders of a patch's values, several samples and channels, and a dtype that rounds."""
    image = torch.randn(2, 3, 6, 4)
    for channels_first in (True, False):
        got, want = [], []
        for backend, made in (("cuda", got), ("torch", want)):
            with dispatch.use_backend(backend):
                made.append(PATCHIFY((image,), (2, channels_first, BF16)))
                made.append(UNPATCHIFY((made[0],), (3, 2, 2, channels_first)))
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def check_embed_without_positions() -> None:
    inputs = test_patch_embed.make_inputs(2, (3, 2), 12, 2)
    test_patch_embed.assert_parity({n: v for n, v in inputs.items() if n != "pos_embed"})


def check_embed_of_many_lines() -> None:
    """So many that a block takes several tiles of channels."""
    x, weight = torch.randn(1 << 15, 1, 1, 1), torch.randn(130, 1, 1, 1)
    torch.testing.assert_close(patch_embed(x, weight)[:, 0], x[:, 0, 0] * weight[:, 0, 0, 0], rtol=0, atol=0)


def check_final_layer_in_other_dtypes() -> None:
    """An rmsnorm, a stream that rounds what the residual adds to it, constant rows, and rows whose variance overflows."""
    test_constant_rows.check("final_layer", 1152, F32, test_constant_rows.constant, 0.0)
    test_constant_rows.check_overflow("final_layer", 48, F32, compiled=True)
    inputs = test_final_layer.make_inputs(2, (3, 1), 16, 2)
    test_final_layer.assert_parity(inputs, grid=(3, 1), patch_size=2, norm="rmsnorm")
    x, branch = torch.ones(1, 1, 8, dtype=BF16), torch.zeros(1, 1, 8)
    x[..., ::2], branch[..., 0] = -1, 2**-12
    rows = final_layer(x, None, None, torch.eye(8), branch=branch, grid=(1, 1), patch_size=1)
    alone = final_layer(x, None, None, torch.eye(8), grid=(1, 1), patch_size=1)
    torch.testing.assert_close(rows, alone, rtol=0, atol=0)


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
    room = torch.empty(inputs["x"].numel() + 1, dtype=BF16)
    test_mlp.assert_parity({**inputs, "x": room[1:].view_as(inputs["x"]).copy_(inputs["x"])})
    for epilogue in EPILOGUES.values():
        check_a_lack_of_algorithms(build_of_mutants(), epilogue, False)
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
    NORM: (check_norm, check_by_token, check_branch_norm, check_wanted),
    GELU: (check_bias_gelu, check_wanted),
    QKV: (check_qkv,),
    ADAMW: (check_adamw,),
    IMAGE: (
        *(check_moves, check_patch_embed, check_embed_without_positions, check_embed_of_many_lines),
        *(check_final_layer, check_final_layer_in_other_dtypes, check_rows_are_rounded),
    ),
}
FAMILIES[PRODUCTS] = FAMILIES[IMAGE]
ALL = tuple(dict.fromkeys(itertools.chain(*FAMILIES.values())))


def run_checks(file: str) -> None:
    """Those of the file's family, or all for what the families share.

    Fresh memory is filled with NaN: where a fault leaves out a write, the right numbers of an earlier run may lie there.
    """
    with test_bias_gelu.poisoned():
        for check in FAMILIES.get(file, ALL):
            check()


def test_the_kernels_as_they_are_pass() -> None:
    run_checks(COMMON)


@pytest.mark.parametrize("name", MUTANTS)
def test_killed(emulation: ModuleType, name: str) -> None:
    emulation.mutate(list(MUTANTS).index(name) + 1)
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        run_checks(MUTANTS[name][0])
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
        "not wanted",
        "is not given",
        "no algorithm",
        "not refused",
        "do not match",
    )
    assert any(word in str(caught.value) for word in words), str(caught.value)
