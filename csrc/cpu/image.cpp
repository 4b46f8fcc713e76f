// The CPU kernels of `patchify`, `unpatchify`, `patch_embed` and `final_layer`. Formulas and names are those at the top of
// ditkernels/ops/image/__init__.py.
//
//   to_tokens  a thread owns rows of the grid: reads their pixels once, writes the patches as tokens.
//   to_image   the other way round; adds the linear's bias to the values, if there is one.
//   embed      a thread owns tokens: adds bias and positions to what the product made, rounds once.
//
// patch_embed is to_tokens, torch's product, embed. final_layer is the norm's forward, torch's product, to_image. The product is
// fp32 for every dtype: its operands hold values rounded to the weight's dtype, and what it makes is rounded once, at the end.
// Its bits may depend on the number of threads; the kernels' do not.
#include "norm.h"

namespace ditkernels {

// Values of tokens and pixels of an image (B, C, H, W), strides in elements; `bias` is one value a channel of a token, or null.
struct Patches {
  void *tokens, *image;
  int64_t token_sample, token, value, image_sample, channel, row, column;
  const float* bias;
  int64_t channels, grid_h, grid_w, patch;
  int token_dtype, image_dtype, rounding;  // tokens of fp32 hold values rounded to `rounding`
  bool channels_first;
};

// z, fp32 and packed, may lie where `out` does.
struct Embed {
  Tokens z, pos_embed, out;
  Vector bias;
  int64_t tokens, width;
};

struct ImageKernels {
  void (*to_tokens)(const Patches&, int64_t first_row, int64_t end_row);
  void (*to_image)(const Patches&, int64_t first_row, int64_t end_row);
  void (*embed)(const Embed&, int64_t first_token, int64_t end_token, float* scratch);
};

constexpr int EMBED_ROWS = 2;  // of scratch, each of padded(width) floats

DITKERNELS_EVERY_ISA(DITKERNELS_DECLARE, ImageKernels, image)

}  // namespace ditkernels

#ifdef DITKERNELS_ISA
#include "lanes.h"

namespace ditkernels::DITKERNELS_ISA {
namespace {

// Calls body(offset of a token's value, offset of its pixel, which value) for a row of the grid.
template <typename Body>
inline void each_pixel(const Patches& a, int64_t grid_row, const Body& body) {
  const int64_t p = a.patch, sample = grid_row / a.grid_h, i = grid_row % a.grid_h;
  const int64_t tokens = sample * a.token_sample + i * a.grid_w * a.token;
  for (int64_t channel = 0; channel < a.channels; ++channel)
    for (int64_t r = 0; r < p; ++r)
      for (int64_t c = 0; c < p; ++c) {
        const int64_t value = a.channels_first ? (channel * p + r) * p + c : (r * p + c) * a.channels + channel;
        const int64_t pixels = sample * a.image_sample + channel * a.channel + (i * p + r) * a.row + c * a.column;
        for (int64_t j = 0; j < a.grid_w; ++j) body(tokens + j * a.token + value * a.value, pixels + j * p * a.column, value);
      }
}

template <typename T, typename U>
inline void copy_one(const T* from, U* to, float added) {
  if constexpr (DTYPE<T> == DTYPE<U> && DTYPE<T> != FLOAT)
    *to = *from;
  else
    store(to, Part{1}, load(from, Part{1}) + added);
}

void to_tokens(const Patches& a, int64_t begin, int64_t end) {
  by_dtype(a.image_dtype, [&](auto image) {
    by_dtype(a.rounding, [&](auto rounding) {
      using T = decltype(image);
      using U = decltype(rounding);
      const T* pixels = static_cast<const T*>(a.image);
      const auto gather_row = [&](int64_t token, int64_t pixel, int64_t) {
        if (a.token_dtype == DTYPE<U>) return copy_one(pixels + pixel, static_cast<U*>(a.tokens) + token, 0.0f);
        const Lanes lanes = rounded(load(pixels + pixel, Part{1}), U{});
        store(static_cast<float*>(a.tokens) + token, Part{1}, lanes);
      };
      for (int64_t row = begin; row < end; ++row) each_pixel(a, row, gather_row);
    });
  });
}

void to_image(const Patches& a, int64_t begin, int64_t end) {
  by_dtype(a.token_dtype, [&](auto token) {
    by_dtype(a.image_dtype, [&](auto image) {
      const auto* values = static_cast<const decltype(token)*>(a.tokens);
      auto* pixels = static_cast<decltype(image)*>(a.image);
      for (int64_t row = begin; row < end; ++row)
        each_pixel(a, row, [&](int64_t from, int64_t to, int64_t value) {
          copy_one(values + from, pixels + to, a.bias == nullptr ? 0.0f : a.bias[value]);
        });
    });
  });
}

void embed(const Embed& a, int64_t begin, int64_t end, float* scratch) {
  float *bias = scratch, *room = scratch + row_floats(a.width);
  read(a.bias, 0, 0, a.width, 0.0f, bias);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = at / a.tokens, token = at % a.tokens;
    const float* z = static_cast<const float*>(a.z.data) + at * a.width;
    const float* added = a.pos_embed.data == nullptr ? nullptr : row_of<float>(a.pos_embed, 0, token, a.width, room);
    by_dtype(a.out.dtype, [&](auto type) {
      auto* out = place_of<decltype(type)>(a.out, sample, token, nullptr);
      each(a.width, [&](int64_t i, auto reach) {
        Lanes value = load(z + i, reach) + load(bias + i, reach);
        if (added != nullptr) value += load(added + i, reach);
        store(out + i, reach, value);
      });
    });
  }
}

}  // namespace

const ImageKernels image = {to_tokens, to_image, embed};

}  // namespace ditkernels::DITKERNELS_ISA

#else
#include "host.h"

namespace ditkernels {
namespace {

const ImageKernels& kernels() {
  static const ImageKernels* const tables[] = {DITKERNELS_EVERY_ISA(DITKERNELS_ADDRESS, image)};
  return *tables[isa()];
}

// Tokens (B, h·w, p·p·C), packed or at strides, and an image (B, C, h·p, w·p).
Patches patches(const Tensor& tokens, const Tensor& image, int64_t patch, bool channels_first) {
  Patches a = {};
  a.tokens = tokens.data_ptr();
  a.token_sample = tokens.stride(0);
  a.token = tokens.stride(1);
  a.value = tokens.stride(2);
  a.image = image.data_ptr();
  a.image_sample = image.stride(0);
  a.channel = image.stride(1);
  a.row = image.stride(2);
  a.column = image.stride(3);
  a.channels = image.size(1);
  a.grid_h = image.size(2) / patch;
  a.grid_w = image.size(3) / patch;
  a.patch = patch;
  a.token_dtype = dtype_of(tokens);
  a.image_dtype = dtype_of(image);
  a.rounding = a.token_dtype;
  a.channels_first = channels_first;
  return a;
}

void run(void (*kernel)(const Patches&, int64_t, int64_t), const Patches& a, int64_t samples) {
  const int64_t values = a.grid_w * a.patch * a.patch * a.channels;
  in_parallel(samples * a.grid_h, values, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
}

// Rows (M, K) times a weight of V rows of K values, in fp32: (M, V).
Tensor product(const Tensor& rows, int64_t m, int64_t k, const Tensor& weight) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(weight, ScalarType::Float));
  const int64_t v = weight.size(0);
  const Tensor made = empty({m, v}, FLOAT);
  if (m == 0) return made;
  // Views without a history, and a product that writes into a tensor: autograd and autocast see neither.
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor left = torch::stable::from_blob(rows.data_ptr(), {m, k}, {k, 1}, cpu, ScalarType::Float);
  const Tensor right = torch::stable::from_blob(wide.data_ptr(), {k, v}, {1, k}, cpu, ScalarType::Float);
  using torch::stable::detail::from;
  StableIValue stack[] = {from(left), from(right), from(made)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
  return made;
}

Tensor patchify(Tensor image, int64_t patch_size, bool channels_first, ScalarType dtype) {
  const int64_t grid_h = image.size(2) / patch_size, grid_w = image.size(3) / patch_size;
  const Tensor tokens = empty({image.size(0), grid_h * grid_w, patch_size * patch_size * image.size(1)}, number(dtype));
  run(kernels().to_tokens, patches(tokens, image, patch_size, channels_first), image.size(0));
  return tokens;
}

Tensor unpatchify(Tensor tokens, int64_t grid_h, int64_t grid_w, int64_t patch_size, bool channels_first) {
  const int64_t channels = tokens.size(2) / (patch_size * patch_size);
  const Tensor image = empty({tokens.size(0), channels, grid_h * patch_size, grid_w * patch_size}, dtype_of(tokens));
  run(kernels().to_image, patches(tokens, image, patch_size, channels_first), tokens.size(0));
  return image;
}

Tensor patch_embed(Tensor x, Tensor weight, OptionalTensor bias, OptionalTensor pos_embed, ScalarType out_dtype) {
  const int64_t samples = x.size(0), patch = weight.size(2), width = weight.size(0);
  const int64_t length = x.size(2) / patch * (x.size(3) / patch), values = x.size(1) * patch * patch;
  const Tensor rows = empty({samples, length, values}, FLOAT);
  Patches gathered = patches(rows, x, patch, true);
  gathered.rounding = dtype_of(weight);
  run(kernels().to_tokens, gathered, samples);
  const Tensor z = product(rows, samples * length, values, weight);
  const Tensor out = number(out_dtype) == FLOAT ? torch::stable::view(z, {samples, length, width})
                                                : empty({samples, length, width}, number(out_dtype));
  Embed a = {};
  a.z = {z.data_ptr(), length * width, width, 1, FLOAT};
  a.pos_embed = tokens(pos_embed);
  a.out = tokens(out);
  a.bias = vector(bias);
  a.tokens = length;
  a.width = width;
  const ImageKernels& table = kernels();
  in_parallel(samples * length, width, [&](int64_t begin, int64_t end) {
    const Scratch scratch(EMBED_ROWS * padded(width));
    table.embed(a, begin, end, scratch.get());
  });
  return out;
}

Tensor final_layer(
    Tensor x, OptionalTensor branch, OptionalTensor gate, OptionalTensor branch_bias, OptionalTensor shift, OptionalTensor scale,
    OptionalTensor norm_weight, OptionalTensor norm_bias, Tensor weight, OptionalTensor bias, int64_t grid_h, int64_t grid_w,
    int64_t patch_size, std::string norm, double eps, ScalarType out_dtype) {
  const int64_t samples = x.size(0), length = x.size(1), width = x.size(2), values = weight.size(0);
  const Tensor h = empty({samples, length, width}, FLOAT);
  NormForward a = {};
  a.x = tokens(x);
  a.branch = tokens(branch);
  a.h = tokens(h);
  a.gate = vector(gate);
  a.branch_bias = vector(branch_bias);
  a.shift = vector(shift);
  a.scale = vector(scale);
  a.weight = vector(norm_weight);
  a.bias = vector(norm_bias);
  a.tokens = length;
  a.width = width;
  a.rounding = dtype_of(weight);
  a.rms = norm == "rmsnorm";
  a.eps = static_cast<float>(eps);
  norm_forward(a, samples);
  const Tensor z = torch::stable::view(product(h, samples * length, width, weight), {samples, length, values});
  const int64_t channels = values / (patch_size * patch_size);
  const Tensor image = empty({samples, channels, grid_h * patch_size, grid_w * patch_size}, number(out_dtype));
  Patches placed = patches(z, image, patch_size, false);
  const OptionalTensor wide =
      bias.has_value() ? OptionalTensor(torch::stable::contiguous(torch::stable::to(*bias, ScalarType::Float))) : std::nullopt;
  placed.bias = bias.has_value() ? static_cast<const float*>(wide->data_ptr()) : nullptr;
  run(kernels().to_image, placed, samples);
  return image;
}

}  // namespace
}  // namespace ditkernels

STABLE_TORCH_LIBRARY_IMPL(ditkernels, CPU, library) {
  library.impl("patchify_cpu", TORCH_BOX(&ditkernels::patchify));
  library.impl("unpatchify_cpu", TORCH_BOX(&ditkernels::unpatchify));
  library.impl("patch_embed_cpu", TORCH_BOX(&ditkernels::patch_embed));
  library.impl("final_layer_cpu", TORCH_BOX(&ditkernels::final_layer));
}
#endif
