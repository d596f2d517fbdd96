// The kernels, written once; kernels_*.cpp compile them with the flags of one instruction set.
//
// A vector is a GCC/Clang vector of kWidth floats, so that the same lines become AVX-512, AVX2,
// SSE or NEON. Everything is in an unnamed namespace, and no function of the standard library is
// used but memcpy: a shared inline function compiled here with AVX-512 flags could be the one that
// the linker keeps for an older CPU.
#pragma once

#include <cstring>

#include "layer.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

#if defined(__clang__)
#define GSM_UNROLL _Pragma("unroll")
#else
#define GSM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace gsm {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16, kTileRows = 8, kTileBlock16 = 3, kBlockRows = 8;
#elif defined(__AVX2__)
constexpr int kWidth = 8, kTileRows = 8, kTileBlock16 = 2, kBlockRows = 4;
#else
constexpr int kWidth = 4, kTileRows = 8, kTileBlock16 = 2, kBlockRows = 4;
#endif
constexpr int kPanelVectors = kPanel / kWidth;
constexpr int64_t kCacheFloats = 1 << 19;  // more do not stay in a second-level cache

using Vec = float __attribute__((vector_size(4 * kWidth)));
using Bits = uint32_t __attribute__((vector_size(4 * kWidth)));

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t part(int64_t whole, int64_t parts, int64_t i) { return whole * i / parts; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }
// The first `count` floats, fewer than a vector.
#if defined(__AVX512F__)
inline Vec load_some(const float* p, int64_t count) {
  return (Vec)_mm512_maskz_loadu_ps(__mmask16((1 << count) - 1), p);
}
inline void store_some(float* p, Vec v, int64_t count) {
  _mm512_mask_storeu_ps(p, __mmask16((1 << count) - 1), (__m512)v);
}
#else
inline Vec load_some(const float* p, int64_t count) {
  Vec v{};
  std::memcpy(&v, p, size_t(count) * sizeof(float));
  return v;
}
inline void store_some(float* p, Vec v, int64_t count) {
  std::memcpy(p, &v, size_t(count) * sizeof(float));
}
#endif
inline Vec splat(float value) { return value - Vec{}; }

// Stored values as floats, kWidth at a time.
inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const uint16_t* p) {
  uint16_t __attribute__((vector_size(2 * kWidth))) narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return (Vec)(__builtin_convertvector(narrow, Bits) << 16);
}
inline Vec widen(const int8_t* p) {  // GCC 12 turns the conversion of bytes into scalar code
#if defined(__AVX512F__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, narrow));
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
#else
  Vec v;
  for (int i = 0; i < kWidth; ++i) v[i] = p[i];
  return v;
#endif
}
inline float widen_one(float v) { return v; }
inline float widen_one(int8_t v) { return v; }
inline float widen_one(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

// max(v, 0) that hands NaN on, as torch.relu does.
inline float relu(float v) { return v < 0 ? 0 : v; }
inline Vec relu(Vec v) { return v < Vec{} ? Vec{} : v; }

// The square of kWidth vectors mirrored at its diagonal: log2(kWidth) times, the first half is
// interleaved with the second.
template <int... I>
struct Lanes {};
template <int N, int... I>
struct Count : Count<N - 1, N - 1, I...> {};
template <int... I>
struct Count<0, I...> {
  using type = Lanes<I...>;
};
template <int... I>
inline Vec interleave_low(Vec a, Vec b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + I % 2 * kWidth)...);
}
template <int... I>
inline Vec interleave_high(Vec a, Vec b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (kWidth / 2 + I / 2 + I % 2 * kWidth)...);
}
template <int... I>
inline Vec evens(Vec a, Vec b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, (2 * I)...);
}
inline Vec evens(Vec a, Vec b) { return evens(a, b, typename Count<kWidth>::type{}); }
inline void transpose(Vec (&v)[kWidth]) {
  using All = typename Count<kWidth>::type;
  GSM_UNROLL
  for (int stage = 1; stage < kWidth; stage *= 2) {
    Vec next[kWidth];
    GSM_UNROLL
    for (int i = 0; i < kWidth / 2; ++i) {
      next[2 * i] = interleave_low(v[i], v[i + kWidth / 2], All{});
      next[2 * i + 1] = interleave_high(v[i], v[i + kWidth / 2], All{});
    }
    GSM_UNROLL
    for (int i = 0; i < kWidth; ++i) v[i] = next[i];
  }
}

// ---- Many columns: a strip of the columns of all outputs of a chunk ----------------------------

// The lists of one panel in one block of channels.
struct PanelLists {
  const uint32_t* starts;
  const float* values;  // of entry starts[0] onwards
  const uint16_t* indices;
  int outputs;
  float bias[kPanel];
};

// Where a panel's sums come from and go to: `sum` is a tile of kPanel rows, or null before the
// first block of channels; `out` is that tile again, or the rows of y themselves, finished.
struct Sums {
  const float* sum;
  float* out;
  int64_t stride;    // from one output to the next in out and add
  const float* add;  // null: none
  bool relu;
  bool far;  // rows of y, which no cache holds: fetched ahead
};

inline Vec first_sum(const Sums& sums, int64_t at, float bias) {
  return sums.sum ? load(sums.sum + at) : splat(bias);
}
inline void last_sum(const Sums& sums, int64_t at, Vec v) {
  if (sums.add) v += load(sums.add + at);
  store(sums.out + at, sums.relu ? relu(v) : v);
}

// One output over `Tile` vectors of columns: sum[column] += value * input[column + offset].
// Two to eight chains of sums where one would wait for the latency of its multiply-adds.
template <int Tile>
void row(const PanelLists& panel, int r, const int32_t* offsets, const float* input,
         const Sums& sums) {
  constexpr int kChains = Tile == 1 ? 8 : Tile == 2 ? 4 : Tile <= 4 ? 2 : 1;
  const float* values = panel.values + (panel.starts[r] - panel.starts[0]);
  const uint16_t* indices = panel.indices + (panel.starts[r] - panel.starts[0]);
  const int64_t count = panel.starts[r + 1] - panel.starts[r];
  Vec v[kChains][Tile];
  GSM_UNROLL
  for (int t = 0; t < Tile; ++t) {
    v[0][t] = first_sum(sums, (r * Tile + t) * kWidth, panel.bias[r]);
    GSM_UNROLL
    for (int c = 1; c < kChains; ++c) v[c][t] = Vec{};
  }
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains) {
    GSM_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const float* x = input + offsets[indices[i + c]];
      const float value = values[i + c];
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t) v[c][t] += value * load(x + t * kWidth);
    }
  }
  if constexpr (kChains > 1) {
    for (; i < count; ++i) {
      const float* x = input + offsets[indices[i]];
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t) v[0][t] += values[i] * load(x + t * kWidth);
    }
    GSM_UNROLL
    for (int t = 0; t < Tile; ++t) {
      GSM_UNROLL
      for (int c = kChains / 2; c < kChains; ++c) v[c - kChains / 2][t] += v[c][t];
      GSM_UNROLL
      for (int c = 1; c < kChains / 2; ++c) v[0][t] += v[c][t];
    }
  }
  GSM_UNROLL
  for (int t = 0; t < Tile; ++t) last_sum(sums, r * sums.stride + t * kWidth, v[0][t]);
}

using PanelKernel = void (*)(const PanelLists&, const int32_t* offsets, const float* input,
                             const Sums&);

template <int Tile>
void rows_panel(const PanelLists& panel, const int32_t* offsets, const float* input,
                const Sums& sums) {
  constexpr int kAhead = 4;  // rows
  for (int r = 0; r < panel.outputs; ++r) {
    if (sums.far) {
      const int64_t next = (r + kAhead) * sums.stride;
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t) {
        __builtin_prefetch(sums.out + next + t * kWidth, 1);
        if (sums.add) __builtin_prefetch(sums.add + next + t * kWidth);
      }
    }
    row<Tile>(panel, r, offsets, input, sums);
  }
}

// A panel of 16 outputs with one list: an input is loaded once for kBlockRows outputs.
template <int Tile>
void block_panel(const PanelLists& panel, const int32_t* offsets, const float* input,
                 const Sums& sums) {
  const int64_t count = panel.starts[1] - panel.starts[0];
  for (int r0 = 0; r0 < panel.outputs; r0 += kBlockRows) {
    Vec v[kBlockRows][Tile];
    GSM_UNROLL
    for (int r = 0; r < kBlockRows; ++r) {
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t)
        v[r][t] = first_sum(sums, ((r0 + r) * Tile + t) * kWidth, panel.bias[r0 + r]);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* x = input + offsets[panel.indices[i]];
      Vec xs[Tile];
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t) xs[t] = load(x + t * kWidth);
      GSM_UNROLL
      for (int r = 0; r < kBlockRows; ++r) {
        const float value = panel.values[i * kPanel + r0 + r];
        GSM_UNROLL
        for (int t = 0; t < Tile; ++t) v[r][t] += value * xs[t];
      }
    }
    GSM_UNROLL
    for (int r = 0; r < kBlockRows; ++r) {
      if (r0 + r >= panel.outputs) break;
      GSM_UNROLL
      for (int t = 0; t < Tile; ++t) last_sum(sums, (r0 + r) * sums.stride + t * kWidth, v[r][t]);
    }
  }
}

template <int... I>
PanelKernel pick_rows(int64_t tile, Lanes<I...>) {
  static constexpr PanelKernel table[] = {rows_panel<I + 1>...};
  return table[tile - 1];
}
template <int... I>
PanelKernel pick_block(int64_t tile, Lanes<I...>) {
  static constexpr PanelKernel table[] = {block_panel<I + 1>...};
  return table[tile - 1];
}

// Copies columns [from, from + length) of a linear layer's input, transposed: to[c * stride + i] is
// input (from + i, first + c).
void pack_linear(const Job& job, int64_t first, int64_t channels, int64_t from, int64_t length,
                 float* to, int64_t stride) {
  const int64_t used = most(0, least(length, job.columns - from));
  const float* x = job.x + from * job.channels + first;
  const int64_t square_i = used / kWidth * kWidth, square_c = channels / kWidth * kWidth;
  for (int64_t i = 0; i < square_i; i += kWidth) {
    for (int64_t c = 0; c < square_c; c += kWidth) {
      Vec v[kWidth];
      GSM_UNROLL
      for (int r = 0; r < kWidth; ++r) v[r] = load(x + (i + r) * job.channels + c);
      transpose(v);
      GSM_UNROLL
      for (int r = 0; r < kWidth; ++r) store(to + (c + r) * stride + i, v[r]);
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t begin = c < square_c ? square_i : 0;
    for (int64_t i = begin; i < used; ++i) to[c * stride + i] = x[i * job.channels + c];
    for (int64_t i = used; i < length; ++i) to[c * stride + i] = 0;
  }
}

// Copies columns [from, from + plane.length) of one channel and plane, padding written out. Whole
// vectors: less than 16 floats behind the last one are written too, before what belongs there.
void pack_plane(const Job& job, const Plane& plane, int64_t channel, int64_t from, float* to) {
  // Columns [left, right) of a row lie inside the image.
  const int64_t left = most(0, (job.pad_w - plane.column + job.stride_w - 1) / job.stride_w);
  const int64_t right = least(
      job.pitch, (job.width + job.pad_w - plane.column + job.stride_w - 1) / job.stride_w);
  int64_t v = from % job.pitch, row = from / job.pitch % job.rows;
  int64_t image = from / job.pitch / job.rows;
  for (int64_t done = 0; done < plane.length; v = 0) {
    const int64_t end = least(job.pitch, v + plane.length - done);
    const int64_t y = row * job.stride_h + plane.row - job.pad_h;
    const bool inside = image < job.batch && y >= 0 && y < job.height;
    const int64_t begin = inside ? least(end, most(v, left)) : end;
    const int64_t stop = inside ? most(begin, least(end, right)) : end;
    float* out = to + done - v;
    for (int64_t i = v; i < begin; i += kWidth) store(out + i, Vec{});
    if (begin < stop) {
      const float* x = job.x + ((image * job.channels + channel) * job.height + y) * job.width +
                       plane.column - job.pad_w;
      const float* next = x + job.height * job.width;  // the same line of the next channel
      const float* x_end = job.x + job.batch * job.channels * job.height * job.width;
      int64_t i = begin;
      if (job.stride_w == 1) {
        for (; i < stop && x + i + 16 <= x_end; i += 16) {
          __builtin_prefetch(next + i);
          std::memcpy(out + i, x + i, 64);
        }
      } else if (job.stride_w == 2) {
        for (; i < stop && x + 2 * (i + kWidth) <= x_end; i += kWidth) {
          __builtin_prefetch(next + 2 * i);
          __builtin_prefetch(next + 2 * i + kWidth);
          store(out + i, evens(load(x + 2 * i), load(x + 2 * i + kWidth)));
        }
      }
      for (; i < stop; ++i) out[i] = x[i * job.stride_w];
    }
    for (int64_t i = stop; i < end; i += kWidth) store(out + i, Vec{});
    done += end - v;
    if (++row == job.rows) row = 0, ++image;  // cheaper than dividing: lines are short
  }
}

// Writes the columns [from, from + length) of the outputs [first, first + count) to y.
void unpack_linear(const Job& job, int64_t first, int count, int64_t from, int64_t length,
                   const float* sum, int64_t stride) {
  const int64_t used = least(length, job.columns - from);
  int64_t done = 0;
  if (count == kPanel) {
    for (; done + kWidth <= used; done += kWidth) {
      for (int r0 = 0; r0 < kPanel; r0 += kWidth) {
        Vec v[kWidth];
        GSM_UNROLL
        for (int r = 0; r < kWidth; ++r) v[r] = load(sum + (r0 + r) * stride + done);
        transpose(v);
        for (int i = 0; i < kWidth; ++i) {
          const int64_t at = (from + done + i) * job.outputs + first + r0;
          Vec value = v[i];
          if (job.add) value += load(job.add + at);
          store(job.y + at, job.relu ? relu(value) : value);
        }
      }
    }
  }
  for (; done < used; ++done) {
    for (int r = 0; r < count; ++r) {
      const int64_t at = (from + done) * job.outputs + first + r;
      float value = sum[r * stride + done];
      if (job.add) value += job.add[at];
      job.y[at] = job.relu ? relu(value) : value;
    }
  }
}

void unpack_map(const Job& job, int64_t first, int count, int64_t from, int64_t length,
                const float* sum, int64_t stride) {
  // Without gaps between its rows an image is a single row.
  const bool whole = job.pitch == job.out_width;
  const int64_t pitch = whole ? job.rows * job.pitch : job.pitch;
  const int64_t rows = whole ? 1 : job.rows, out_rows = whole ? 1 : job.out_height;
  const int64_t out_width = whole ? job.out_height * job.out_width : job.out_width;
  const int64_t size = job.out_height * job.out_width;
  int64_t line = from / pitch, v = from % pitch;
  for (int64_t done = 0; done < length; done += pitch - v, ++line, v = 0) {
    const int64_t image = line / rows, y = line % rows;
    if (image >= job.batch) return;
    const int64_t end = least(out_width, v + length - done);
    if (y >= out_rows || v >= end) continue;
    const int64_t n = end - v, whole_vectors = n / kWidth * kWidth;
    for (int r = 0; r < count; ++r) {
      const int64_t at = (image * job.outputs + first + r) * size + y * out_width + v;
      const float* from_sum = sum + r * stride + done;
      auto finished = [&](Vec value, Vec added) {
        if (job.add) value += added;
        return job.relu ? relu(value) : value;
      };
      int64_t i = 0;
      for (; i < whole_vectors; i += kWidth)
        store(job.y + at + i, finished(load(from_sum + i), job.add ? load(job.add + at + i) : Vec{}));
      if (i < n) {
        const Vec added = job.add ? load_some(job.add + at + i, n - i) : Vec{};
        store_some(job.y + at + i, finished(load_some(from_sum + i, n - i), added), n - i);
      }
    }
  }
}

// Where in y these columns of output 0 are, if they lie there in one piece; otherwise -1.
int64_t direct(const Job& job, int64_t from, int64_t length) {
  if (job.linear || job.pitch != job.out_width) return -1;
  const int64_t image = from / (job.rows * job.pitch), v = from % (job.rows * job.pitch);
  const int64_t size = job.out_height * job.out_width;
  return v + length <= size && image < job.batch ? image * job.outputs * size + v : -1;
}

template <class Stored>
void decode(const Stored* values, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, widen(values + i));
  for (; i < count; ++i) to[i] = widen_one(values[i]);
}

// The lists of a panel in one block, its values decoded into `decoded` if they are not floats.
PanelLists panel_lists(const Job& job, int64_t group, int64_t b, int64_t panel, float* decoded) {
  const Header& h = *job.packed;
  const int64_t group_outputs = job.outputs / h.layer.groups;
  const int64_t output = group * group_outputs + panel * kPanel;
  const bool rows = h.format == GSM_ROWS;
  PanelLists result;
  result.outputs = int(least(kPanel, group_outputs - panel * kPanel));
  result.starts = job.starts + (group * h.blocks + b) * h.lists + panel * (rows ? kPanel : 1);
  result.indices = job.indices + result.starts[0];
  for (int r = 0; r < kPanel; ++r)
    result.bias[r] = job.bias && r < result.outputs ? job.bias[output + r] : 0;

  const uint32_t* starts = result.starts;
  const int64_t width = rows ? 1 : kPanel, first = starts[0] * width;
  const int64_t count = (starts[rows ? result.outputs : 1] - starts[0]) * width;
  result.values = h.storage == GSM_F32 ? static_cast<const float*>(job.values) + first : decoded;
  if (h.storage == GSM_BF16)
    decode(static_cast<const uint16_t*>(job.values) + first, count, decoded);
  if (h.storage != GSM_INT8) return result;
  decode(static_cast<const int8_t*>(job.values) + first, count, decoded);
  for (int r = 0; r < result.outputs; ++r) {
    const int64_t from = rows ? starts[r] - starts[0] : r;
    const int64_t to = rows ? starts[r + 1] - starts[0] : count;
    for (int64_t i = from; i < to; i += width) decoded[i] *= job.scales[output + r];
  }
  return result;
}

void pack(const Job& job, int64_t first, int64_t channels, int64_t from, int64_t length,
          float* to) {
  if (job.linear) return pack_linear(job, first, channels, from, length, to, job.channel_floats);
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = 0; p < job.plane_count; ++p)
      pack_plane(job, job.planes[p], first + c, from,
                 to + c * job.channel_floats + job.planes[p].start);
}

// The panels [begin, end) of a group over a strip whose input is packed. Inside a block of channels
// all panels pass over one tile of columns before the next, so that its input stays in the
// first-level cache, and their sums wait in the second-level cache for the next block.
void panels(const Job& job, int64_t group, int64_t begin, int64_t end, int64_t from, int64_t units,
            const float* input, float* sums, float* decoded) {
  const Header& h = *job.packed;
  const int64_t tiles = (units + job.tile_units - 1) / job.tile_units;
  const bool rows = h.format == GSM_ROWS;
  const int64_t group_outputs = job.outputs / h.layer.groups;
  auto tile_sums = [&](int64_t p, int64_t unit) {
    return sums + ((p - begin) * units + unit) * kWidth * kPanel;
  };
  for (int64_t b = 0; b < h.blocks; ++b) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t unit = part(units, tiles, t), tile = part(units, tiles, t + 1) - unit;
      const auto kernel = rows ? pick_rows(tile, typename Count<kTileRows>::type{})
                               : pick_block(tile, typename Count<kTileBlock16>::type{});
      const float* x = input + b * h.block_channels * job.channel_floats + unit * kWidth;
      const int64_t at = b + 1 < h.blocks ? -1 : direct(job, from + unit * kWidth, tile * kWidth);
      for (int64_t p = begin; p < end; ++p) {
        float* sum = tile_sums(p, unit);
        Sums place = {b == 0 ? nullptr : sum, sum, tile * kWidth, nullptr, false, false};
        if (at >= 0) {
          const int64_t size = job.out_height * job.out_width;
          const int64_t first = at + (group * group_outputs + p * kPanel) * size;
          place.out = job.y + first, place.stride = size;
          place.add = job.add ? job.add + first : nullptr, place.relu = job.relu;
          place.far = job.batch * job.outputs * size > kCacheFloats;
        }
        kernel(panel_lists(job, group, b, p, decoded), job.offsets, x, place);
      }
    }
  }
  // Panel by panel, as every output is a long way from the next in memory.
  for (int64_t p = begin; p < end; ++p) {
    const int64_t output = group * group_outputs + p * kPanel;
    const int count = int(least(kPanel, group_outputs - p * kPanel));
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t unit = part(units, tiles, t), tile = part(units, tiles, t + 1) - unit;
      if (direct(job, from + unit * kWidth, tile * kWidth) >= 0) continue;
      auto unpack = job.linear ? unpack_linear : unpack_map;
      unpack(job, output, count, from + unit * kWidth, tile * kWidth, tile_sums(p, unit),
             tile * kWidth);
    }
  }
}

void strip(const Job& job, int64_t number, int64_t chunk, float* scratch) {
  const Header& h = *job.packed;
  const int64_t groups = h.layer.groups, channels = job.channels / groups;
  float* sums = scratch + job.input_floats;
  float* decoded = sums + job.sum_floats;
  const int64_t first_unit = part(job.units, job.strips, number);
  const int64_t units = part(job.units, job.strips, number + 1) - first_unit;
  const int64_t from = first_unit * kWidth;
  const int64_t first = part(h.panels * groups, job.chunks, chunk);
  const int64_t last = part(h.panels * groups, job.chunks, chunk + 1);
  for (int64_t group = first / h.panels; group * h.panels < last; ++group) {
    const float* input = scratch;
    if (job.in_place) {
      const int64_t size = job.height * job.width, image = from / size;
      input = job.x + (image * job.channels + group * channels) * size + from % size;
    } else {
      pack(job, group * channels, channels, from, units * kWidth, scratch);
    }
    const int64_t begin = most(0, first - group * h.panels);
    const int64_t end = least(h.panels, last - group * h.panels);
    for (int64_t p = begin; p < end; p += job.sum_panels)
      panels(job, group, p, least(end, p + job.sum_panels), from, units, input, sums, decoded);
  }
}

// ---- Few columns: a linear layer of small batch, one panel of outputs --------------------------

void finish_few(const Job& job, int64_t panel, int64_t row, const float* sums) {
  const int64_t first = panel * kPanel, count = least(kPanel, job.outputs - first);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = row * job.outputs + first + r;
    float value = sums[r];
    if (job.packed->storage == GSM_INT8) value *= job.scales[first + r];
    if (job.bias) value += job.bias[first + r];
    if (job.add) value += job.add[at];
    job.y[at] = job.relu ? relu(value) : value;
  }
}

// Eight scalar sums: gathers are no faster, the limit is one load of index, value and input each.
template <class Stored>
void few_rows(const Job& job, int64_t panel) {
  const Header& h = *job.packed;
  const Stored* values = static_cast<const Stored*>(job.values);
  const int64_t first = panel * kPanel, count = least(kPanel, job.outputs - first);
  for (int64_t row = 0; row < job.columns; ++row) {
    float sums[kPanel];
    for (int64_t r = 0; r < count; ++r) {
      float chains[8] = {};
      for (int64_t b = 0; b < h.blocks; ++b) {
        const float* x = job.x + row * job.channels + b * h.block_channels;
        const uint32_t* starts = job.starts + b * h.lists + first + r;
        int64_t i = starts[0];
        const int64_t end = starts[1];
        for (; i + 8 <= end; i += 8)
          for (int c = 0; c < 8; ++c) chains[c] += widen_one(values[i + c]) * x[job.indices[i + c]];
        for (int c = 0; i < end; ++i, ++c) chains[c] += widen_one(values[i]) * x[job.indices[i]];
      }
      sums[r] = ((chains[0] + chains[1]) + (chains[2] + chains[3])) +
                ((chains[4] + chains[5]) + (chains[6] + chains[7]));
    }
    finish_few(job, panel, row, sums);
  }
}

// Batch rows at a time; a weight is read once for all of them. Chains hide the latency.
template <class Stored, int Batch>
void few_block16(const Job& job, int64_t panel, int64_t row) {
  constexpr int kChains = Batch * kPanelVectors >= 4 ? 1 : 4 / (Batch * kPanelVectors);
  const Header& h = *job.packed;
  Vec sums[kChains][Batch][kPanelVectors] = {};
  for (int64_t b = 0; b < h.blocks; ++b) {
    const float* x = job.x + row * job.channels + b * h.block_channels;
    const uint32_t* starts = job.starts + b * h.lists + panel;
    const Stored* values = static_cast<const Stored*>(job.values) + int64_t(starts[0]) * kPanel;
    const uint16_t* indices = job.indices + starts[0];
    const int64_t count = starts[1] - starts[0];
    auto entry = [&](int64_t i, int c) __attribute__((always_inline)) {
      GSM_UNROLL
      for (int v = 0; v < kPanelVectors; ++v) {
        const Vec w = widen(values + i * kPanel + v * kWidth);
        GSM_UNROLL
        for (int n = 0; n < Batch; ++n)
          sums[c][n][v] += x[n * job.channels + indices[i]] * w;
      }
    };
    int64_t i = 0;
    for (; i + kChains <= count; i += kChains) {
      GSM_UNROLL
      for (int c = 0; c < kChains; ++c) entry(i + c, c);
    }
    if constexpr (kChains > 1)
      for (; i < count; ++i) entry(i, 0);
  }
  float out[Batch][kPanel];
  GSM_UNROLL  // an index that is not constant would keep the sums in memory
  for (int n = 0; n < Batch; ++n) {
    GSM_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) {
      Vec sum = sums[0][n][v];
      GSM_UNROLL
      for (int c = 1; c < kChains; ++c) sum += sums[c][n][v];
      store(out[n] + v * kWidth, sum);
    }
  }
  for (int n = 0; n < Batch; ++n) finish_few(job, panel, row + n, out[n]);
}

// A window of 16 inputs, and the fetch of a vector of them: from each lane's place, 0 where unused.
#if defined(__AVX512F__)
struct Window {
  __m512 x;
  void read(const float* p, int64_t left) {
    x = _mm512_maskz_loadu_ps(__mmask16(left >= kWindow ? 0xffff : (1 << left) - 1), p);
  }
};
struct Slot {
  __m512i place;
  __mmask16 used;
  Slot(const uint8_t* p, uint32_t lanes) : used(__mmask16(lanes)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    place = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
  }
};
inline Vec fetch(const Window& window, const Slot& slot) {
  return (Vec)_mm512_maskz_permutexvar_ps(slot.used, slot.place, window.x);
}
#elif defined(__AVX2__)
struct Window {
  __m256 low, high;
  void read(const float* p, int64_t left) {
    float padded[kWindow] = {};
    if (left < kWindow) p = static_cast<float*>(std::memcpy(padded, p, size_t(left) * 4));
    low = _mm256_loadu_ps(p), high = _mm256_loadu_ps(p + 8);
  }
};
struct Slot {
  __m256i place, used;
  Slot(const uint8_t* p, uint32_t lanes) {
    place = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m256i to_sign = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    used = _mm256_srai_epi32(_mm256_sllv_epi32(_mm256_set1_epi32(int(lanes)), to_sign), 31);
  }
};
inline Vec fetch(const Window& window, const Slot& slot) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(slot.place, 28));  // bit 3 as sign
  const __m256 x = _mm256_blendv_ps(_mm256_permutevar8x32_ps(window.low, slot.place),
                                    _mm256_permutevar8x32_ps(window.high, slot.place), upper);
  return (Vec)_mm256_and_ps(x, _mm256_castsi256_ps(slot.used));
}
#else
struct Window {
  const float* x;
  void read(const float* p, int64_t) { x = p; }
};
struct Slot {
  const uint8_t* place;
  uint32_t used;
  Slot(const uint8_t* p, uint32_t lanes) : place(p), used(lanes) {}
};
inline Vec fetch(const Window& window, const Slot& slot) {
  Vec v{};
  for (int l = 0; l < kWidth; ++l)
    if (slot.used >> l & 1) v[l] = window.x[slot.place[l]];
  return v;
}
#endif

// 16 outputs by 16 inputs at a time: four to six times the rate of few_rows on AVX-512. Windows of
// 32 in two registers would need fewer slots, and were no faster.
template <class Stored, int Batch>
void few_lanes(const Job& job, int64_t panel, int64_t row) {
  const Header& h = *job.packed;
  const int64_t windows = h.blocks, channels = job.channels;
  const uint32_t* starts = job.starts + panel * windows;
  const uint8_t* places = reinterpret_cast<const uint8_t*>(job.indices);
  const uint16_t* masks = job.masks;
  const Stored* values = static_cast<const Stored*>(job.values);
  const float* x = job.x + row * channels;
  Vec sums[Batch][kPanelVectors] = {};
  for (int64_t w = 0; w < windows; ++w, x += kWindow) {
    Window window[Batch];
    GSM_UNROLL
    for (int n = 0; n < Batch; ++n) window[n].read(x + n * channels, channels - w * kWindow);
    for (int64_t i = starts[w]; i < starts[w + 1]; ++i) {
      GSM_UNROLL
      for (int v = 0; v < kPanelVectors; ++v) {
        const int64_t at = i * kPanel + v * kWidth;
        const Slot slot(places + at, uint32_t(masks[i]) >> (v * kWidth));
        const Vec value = widen(values + at);
        GSM_UNROLL
        for (int n = 0; n < Batch; ++n) sums[n][v] += value * fetch(window[n], slot);
      }
    }
  }
  float out[Batch][kPanel];
  GSM_UNROLL  // an index that is not constant would keep the sums in memory
  for (int n = 0; n < Batch; ++n) {
    GSM_UNROLL
    for (int v = 0; v < kPanelVectors; ++v) store(out[n] + v * kWidth, sums[n][v]);
  }
  for (int n = 0; n < Batch; ++n) finish_few(job, panel, row + n, out[n]);
}

template <class Stored, int Batch>
void few_rows_of_batch(const Job& job, int64_t panel, int64_t& row) {
  for (; row + Batch <= job.columns; row += Batch)
    job.packed->format == GSM_LANES ? few_lanes<Stored, Batch>(job, panel, row)
                                    : few_block16<Stored, Batch>(job, panel, row);
}

template <class Stored>
void few(const Job& job, int64_t panel) {
  if (job.packed->format == GSM_ROWS) return few_rows<Stored>(job, panel);
  int64_t row = 0;
  if constexpr (kWidth == 16) few_rows_of_batch<Stored, 8>(job, panel, row);  // 32 registers
  few_rows_of_batch<Stored, 4>(job, panel, row);
  few_rows_of_batch<Stored, 1>(job, panel, row);
}

void few_any(const Job& job, int64_t panel) {
  if (job.packed->storage == GSM_F32) few<float>(job, panel);
  if (job.packed->storage == GSM_BF16) few<uint16_t>(job, panel);
  if (job.packed->storage == GSM_INT8) few<int8_t>(job, panel);
}

// ---- Max pooling ------------------------------------------------------------------------------

inline Vec maximum(Vec best, Vec v) { return (v > best) | (v != v) ? v : best; }
inline float maximum(float best, float v) { return v > best || v != v ? v : best; }

// Of kWidth channels: the maxima over a window, whose inputs inside the image these are.
Vec window_max(const float* x, int64_t lines, int64_t columns, int64_t pitch, int64_t step,
               int64_t channels) {
  Vec best = splat(-__builtin_inff());
  for (int64_t i = 0; i < lines; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const float* at = x + i * pitch + j * step;
      best = maximum(best, channels == kWidth ? load(at) : load_some(at, channels));
    }
  return best;
}

void max_pool_last(const PoolJob& job, int64_t line) {
  const gsm_pool& p = job.pool;
  const int64_t image = line / job.out_height, row = line % job.out_height;
  const int64_t top = row * p.stride_h - p.pad_h, first_line = most(0, top);
  const int64_t lines = least(p.height, top + p.kernel_h) - first_line;
  const float* x = job.x + (image * p.height + first_line) * p.width * p.channels;
  float* y = job.y + (image * p.channels * job.out_height + row) * job.out_width;
  for (int64_t c = 0; c < p.channels; c += kWidth) {
    const int64_t channels = least(kWidth, p.channels - c);
    for (int64_t column = 0; column < job.out_width; column += kWidth) {
      const int64_t columns = least(kWidth, job.out_width - column);
      Vec v[kWidth] = {};
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t left = (column + i) * p.stride_w - p.pad_w, first = most(0, left);
        v[i] = window_max(x + first * p.channels + c, lines, least(p.width, left + p.kernel_w) - first,
                          p.width * p.channels, p.channels, channels);
      }
      transpose(v);
      for (int64_t r = 0; r < channels; ++r) {
        float* to = y + (c + r) * job.out_height * job.out_width + column;
        columns == kWidth ? store(to, v[r]) : store_some(to, v[r], columns);
      }
    }
  }
}

void max_pool_first(const PoolJob& job, int64_t line) {
  const gsm_pool& p = job.pool;
  const int64_t top = line % job.out_height * p.stride_h - p.pad_h, first_line = most(0, top);
  const int64_t lines = least(p.height, top + p.kernel_h) - first_line;
  const float* x = job.x + (line / job.out_height * p.height + first_line) * p.width;
  const float* x_end = job.x + p.batch * p.channels * p.height * p.width;
  float* y = job.y + line * job.out_width;
  const int64_t inside = (p.pad_w + p.stride_w - 1) / p.stride_w;  // the first without padding
  const int64_t end = most(inside, (p.width + p.pad_w - p.kernel_w) / p.stride_w + 1);
  auto one = [&](int64_t column) {
    const int64_t left = column * p.stride_w - p.pad_w, first = most(0, left);
    float best = -__builtin_inff();
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t j = first; j < least(p.width, left + p.kernel_w); ++j)
        best = maximum(best, x[i * p.width + j]);
    y[column] = best;
  };
  int64_t column = 0;
  for (; column < least(inside, job.out_width); ++column) one(column);
  while (p.stride_w <= 2 && column < end && end - inside >= kWidth) {
    column = least(column, end - kWidth);  // the rest, with some once more
    const float* at = x + column * p.stride_w - p.pad_w;
    const float* last = at + (lines - 1) * p.width + p.kernel_w - 1;
    if (last + p.stride_w * kWidth > x_end) break;
    Vec best = splat(-__builtin_inff());
    for (int64_t i = 0; i < lines; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const float* from = at + i * p.width + j;
        best = maximum(best, p.stride_w == 1 ? load(from) : evens(load(from), load(from + kWidth)));
      }
    store(y + column, best);
    column += kWidth;
  }
  for (; column < job.out_width; ++column) one(column);
}

constexpr Kernels kKernels = {kWidth,  kTileRows,     kTileBlock16,  strip,
                              few_any, max_pool_last, max_pool_first};

}  // namespace
}  // namespace gsm
