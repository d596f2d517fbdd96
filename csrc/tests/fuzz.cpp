// Random layers on every instruction set against a float64 reference, for the sanitizers.
//
// Every array is a heap block of exactly its size, so that AddressSanitizer sees a read of a single
// float beside it, and starts at a multiple of 64 bytes or four bytes behind one.
//
//     fuzz [layers] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../gossamer_kernels.h"

namespace {

std::mt19937 rng;

int64_t pick(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
bool chance(double p) { return std::bernoulli_distribution(p)(rng); }

void fail(const char* what, const gsm_layer& l, int format, int storage, int isa) {
  std::fprintf(stderr,
               "%s: %d->%d groups %d kernel %dx%d stride %dx%d pad %dx%d dilation %dx%d, "
               "format %d, storage %d, isa %d\n",
               what, l.in_channels, l.out_channels, l.groups, l.kernel_h, l.kernel_w, l.stride_h,
               l.stride_w, l.pad_h, l.pad_w, l.dilation_h, l.dilation_w, format, storage, isa);
  std::exit(1);
}

// Floats that end where the heap block ends.
class Floats {
 public:
  explicit Floats(int64_t size, bool aligned = false) : offset_(aligned ? 0 : 4), size_(size) {
    if (posix_memalign(&memory_, 64, size_t(size) * 4 + offset_)) std::abort();
  }
  ~Floats() { std::free(memory_); }
  Floats(const Floats&) = delete;
  float* data() { return reinterpret_cast<float*>(static_cast<char*>(memory_) + offset_); }
  float& operator[](int64_t i) { return data()[i]; }
  void fill() {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < size_; ++i) data()[i] = normal(rng);
  }

 private:
  void* memory_;
  size_t offset_;
  int64_t size_;
};

struct Maps {
  int64_t batch, height, width, out_height, out_width;
};

double reference(const gsm_layer& l, const Maps& m, Floats& x, const float* weight, int64_t n,
                 int64_t o, int64_t oy, int64_t ox) {
  const int64_t channels = l.in_channels / l.groups, group = o / (l.out_channels / l.groups);
  double sum = 0;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < l.kernel_h; ++i)
      for (int64_t j = 0; j < l.kernel_w; ++j) {
        const int64_t y = oy * l.stride_h + i * l.dilation_h - l.pad_h;
        const int64_t xx = ox * l.stride_w + j * l.dilation_w - l.pad_w;
        if (y < 0 || y >= m.height || xx < 0 || xx >= m.width) continue;
        const int64_t at = ((n * l.in_channels + group * channels + c) * m.height + y) * m.width;
        sum += double(weight[((o * channels + c) * l.kernel_h + i) * l.kernel_w + j]) * x[at + xx];
      }
  return sum;
}

void one_layer(int isa) {
  const int format = int(pick(GSM_ROWS, GSM_LANES)), storage = int(pick(GSM_F32, GSM_INT8));
  const bool linear = format == GSM_LANES || chance(0.4);
  const bool pointwise = linear || chance(0.3);
  auto size = [&](int64_t low, int64_t high, int64_t pointwise_size) {
    return int32_t(pointwise ? pointwise_size : pick(low, high));
  };
  gsm_layer l{};
  l.groups = format == GSM_LANES ? 1 : int32_t(pick(1, 3));
  l.out_channels = l.groups * int32_t(pick(1, 36));
  l.in_channels = l.groups * int32_t(chance(0.1) ? pick(120, 300) : pick(1, 70));
  l.kernel_h = size(1, 4, 1), l.kernel_w = size(1, 4, 1);
  l.stride_h = size(1, 3, 1), l.stride_w = size(1, 3, 1);
  l.dilation_h = size(1, 2, 1), l.dilation_w = size(1, 2, 1);
  l.pad_h = size(0, 3, 0), l.pad_w = size(0, 3, 0);
  Maps m{pick(0, 4), size(1, 12, 1), size(1, 24, 1), 0, 0};
  if (pointwise && !linear) m.height = 4 * pick(1, 5), m.width = 4 * pick(1, 5);
  if (linear && chance(0.5)) m.batch = pick(1, 90);
  const int64_t room_h = m.height + 2 * l.pad_h - (l.kernel_h - 1) * l.dilation_h - 1;
  const int64_t room_w = m.width + 2 * l.pad_w - (l.kernel_w - 1) * l.dilation_w - 1;
  if (room_h < 0 || room_w < 0) return;
  m.out_height = room_h / l.stride_h + 1, m.out_width = room_w / l.stride_w + 1;

  const int64_t weights =
      int64_t(l.out_channels) * (l.in_channels / l.groups) * l.kernel_h * l.kernel_w;
  Floats weight(weights), stored(weights);
  weight.fill();
  const double densities[] = {0, 0.02, 0.1, 0.5, 1}, density = densities[pick(0, 4)];
  for (int64_t i = 0; i < weights; ++i)
    if (!chance(density)) weight[i] = 0;

  const int64_t bytes = gsm_pack_bytes(&l, format, storage, weight.data());
  if (bytes < 0) fail("gsm_pack_bytes", l, format, storage, isa);
  std::unique_ptr<char[]> packed(new char[size_t(bytes)]);
  if (gsm_pack(&l, format, storage, weight.data(), packed.get(), bytes - 1) != GSM_BAD_ARGUMENT ||
      gsm_pack(&l, format, storage, weight.data(), packed.get(), bytes) ||
      gsm_check(packed.get(), bytes) || gsm_unpack(packed.get(), stored.data()))
    fail("gsm_pack", l, format, storage, isa);
  for (int64_t i = 0; i < weights; ++i)
    if (storage == GSM_F32 ? stored[i] != weight[i] : std::fabs(stored[i] - weight[i]) > 0.04)
      fail("gsm_unpack", l, format, storage, isa);

  Floats x(m.batch * l.in_channels * m.height * m.width, chance(0.5)), bias(l.out_channels);
  const int64_t outputs = m.batch * l.out_channels * m.out_height * m.out_width;
  Floats y(outputs), add(outputs);
  x.fill(), bias.fill(), add.fill();
  const bool with_bias = chance(0.5), with_add = chance(0.5), relu = chance(0.5);
  for (int64_t i = 0; i < outputs; ++i) y[i] = std::numeric_limits<float>::quiet_NaN();
  if (gsm_run(packed.get(), x.data(), m.batch, m.height, m.width,
              with_bias ? bias.data() : nullptr, with_add ? add.data() : nullptr, relu, y.data(),
              int(pick(1, 3))))
    fail("gsm_run", l, format, storage, isa);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t ox = i % m.out_width, oy = i / m.out_width % m.out_height;
    const int64_t o = i / (m.out_width * m.out_height) % l.out_channels;
    const int64_t n = i / (m.out_width * m.out_height) / l.out_channels;
    double wanted = reference(l, m, x, stored.data(), n, o, oy, ox);
    if (with_bias) wanted += bias[o];
    if (with_add) wanted += add[i];
    if (relu && wanted < 0) wanted = 0;
    if (!(std::fabs(y[i] - wanted) <= 1e-4 * (1 + std::fabs(wanted))))
      fail("wrong result", l, format, storage, isa);
  }

  // A damaged layer is refused, or runs within its memory.
  if (bytes > 192) {
    const int64_t at = pick(0, bytes - 1);
    packed[size_t(at)] = char(pick(-128, 127));
    gsm_layer damaged;
    if (!gsm_check(packed.get(), bytes) && !gsm_packed_layer(packed.get(), &damaged, nullptr,
                                                             nullptr) &&
        !std::memcmp(&damaged, &l, sizeof l))
      gsm_run(packed.get(), x.data(), m.batch, m.height, m.width, nullptr, nullptr, 0, y.data(), 1);
  }
}

void one_pool(int isa) {
  gsm_pool p{pick(0, 3), pick(1, 40), pick(1, 9), pick(1, 40), 0, 0, pick(1, 3), pick(1, 3), 0, 0};
  p.kernel_h = pick(1, 5), p.kernel_w = pick(1, 5);
  p.pad_h = pick(0, p.kernel_h / 2), p.pad_w = pick(0, p.kernel_w / 2);
  const int64_t room_h = p.height + 2 * p.pad_h - p.kernel_h;
  const int64_t room_w = p.width + 2 * p.pad_w - p.kernel_w;
  if (room_h < 0 || room_w < 0) return;
  const int64_t out_h = room_h / p.stride_h + 1, out_w = room_w / p.stride_w + 1;
  Floats x(p.batch * p.height * p.width * p.channels), y(p.batch * p.channels * out_h * out_w);
  x.fill();
  const bool last = chance(0.5);
  bool same = gsm_max_pool(&p, last, x.data(), y.data(), int(pick(1, 3))) == GSM_OK;
  for (int64_t i = 0; i < p.batch * p.channels * out_h * out_w; ++i) {
    const int64_t left = i % out_w * p.stride_w - p.pad_w;
    const int64_t top = i / out_w % out_h * p.stride_h - p.pad_h;
    const int64_t c = i / (out_w * out_h) % p.channels, n = i / (out_w * out_h) / p.channels;
    float wanted = -std::numeric_limits<float>::infinity();
    for (int64_t h = std::max<int64_t>(0, top); h < std::min(p.height, top + p.kernel_h); ++h)
      for (int64_t w = std::max<int64_t>(0, left); w < std::min(p.width, left + p.kernel_w); ++w)
        wanted = std::max(wanted, x[last ? ((n * p.height + h) * p.width + w) * p.channels + c
                                         : ((n * p.channels + c) * p.height + h) * p.width + w]);
    same = same && y[i] == wanted;
  }
  if (same) return;
  std::fprintf(stderr, "max pool of %d channels, isa %d\n", int(p.channels), isa);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  const int layers = argc > 1 ? std::atoi(argv[1]) : 300;
  const unsigned seed = argc > 2 ? unsigned(std::atoi(argv[2])) : 0;
  for (int isa = GSM_PORTABLE; isa <= GSM_AVX512; ++isa) {
    if (gsm_set_isa(isa)) {
      std::printf("isa %d: this CPU cannot run it\n", isa);
      continue;
    }
    rng.seed(seed);
    for (int i = 0; i < layers; ++i) one_layer(isa), one_pool(isa);
    std::printf("isa %d: %d layers, %d pools\n", isa, layers, layers);
  }
}
