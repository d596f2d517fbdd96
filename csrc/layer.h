// What the packing, the driver and the kernels of every instruction set share. Plain data only:
// the kernels are compiled with flags of their own, and a function defined here could be linked
// from the AVX-512 object into the code that runs before the CPU was asked.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gossamer_kernels.h"

namespace gsm {

constexpr int kPanel = 16;   // outputs that are computed and stored together, in every format
constexpr int kWindow = 16;  // inputs of one window of lanes: one AVX-512 register
constexpr int kTableLimit = 65536;  // (channel, tap) pairs that a 16-bit index can tell apart

// The first bytes of a packed layer; the arrays follow at the given byte offsets.
//
// rows, block16: channels are cut into blocks whose input stays in the first-level cache while
//   every output passes over it (one core of a Xeon of 2023 did 57 G multiply-adds a second with
//   inputs from there, and 33 with inputs from the second level). A list is one output (rows) or
//   one panel (block16) in one block of one group; list number (group * blocks + block) * lists + i
//   holds the entries starts[number] .. starts[number + 1]. An entry has an index, channel in the
//   block * taps + tap, and 1 (rows) or kPanel (block16) values.
// lanes: a list is one window of one panel, number panel * windows + window; an entry is a slot:
//   kPanel values, kPanel one-byte places in the window, and a mask of the lanes that are in use.
struct Header {
  uint64_t magic;
  gsm_layer layer;
  int32_t format, storage;
  int32_t block_channels, blocks;  // of one group; lanes: kWindow and the number of windows
  int32_t lists;                   // per block and group; lanes: panels
  int32_t panels;                  // per group
  int64_t entries;
  int64_t starts, indices, masks, values, scales, bytes;
};

// A rectangle of the input as the kernels see it: flat, rows of `pitch` columns, padding written
// out. Position (u, v) of it is input row u * stride_h + row, column v * stride_w + column.
struct Plane {
  int32_t row, column;
  int64_t start, length;  // floats, in the scratch memory of a channel
};

// One call of gsm_run, prepared. Everything is a matter of columns: output position (n, y, x) is
// column (n * rows + y) * pitch + x of a matrix with `columns` columns, the non-zero of tap (i, j)
// and channel c multiplies a stretch of c's plane, and column 0 meets it at offset[c * taps + tap].
// Columns that are no output (between the rows and between the images) are computed and dropped.
struct Job {
  const Header* packed;
  const uint32_t* starts;
  const uint16_t* indices;  // lanes: bytes
  const uint16_t* masks;
  const void* values;
  const float* scales;
  const float* x;
  const float* bias;
  const float* add;
  float* y;
  bool relu;

  bool linear;    // x and y are (columns, channels): both are transposed on the way
  bool in_place;  // the columns are those of x: nothing is copied
  int64_t batch, channels, height, width;     // of x
  int64_t outputs, out_height, out_width;     // of y
  int64_t rows, pitch, columns;
  int64_t stride_h, stride_w, pad_h, pad_w;

  const Plane* planes;
  int64_t plane_count, channel_floats;
  const int32_t* offsets;

  // Work is cut into strips of columns, and where these are few each strip into chunks of panels.
  int64_t units;   // columns / vector width, rounded up
  int64_t strips, chunks, tile_units;
  int64_t sum_panels;  // panels whose sums stay in the cache together
  int64_t input_floats, sum_floats, value_floats;  // scratch memory
};

// One call of gsm_max_pool, prepared.
struct PoolJob {
  gsm_pool pool;
  int64_t out_height, out_width;
  const float* x;
  float* y;
};

// The kernels of one instruction set.
struct Kernels {
  int width;                            // floats in a vector
  int max_tile_rows, max_tile_block16;  // vectors of columns that one pass keeps in registers
  void (*strip)(const Job& job, int64_t strip, int64_t chunk, float* scratch);
  void (*few)(const Job& job, int64_t panel);  // linear layers of small batch: no transposition
  // One output line: of all channels of an image; and of one channel.
  void (*max_pool_last)(const PoolJob& job, int64_t line);
  void (*max_pool_first)(const PoolJob& job, int64_t line);
};

extern const Kernels kernels_portable;
#ifdef GSM_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// pack.cpp
bool valid(const gsm_layer& layer);
const Header* header(const void* packed);

// threads.cpp: calls work(context, i) for every i below count, on at most `threads` threads.
void parallel(int threads, int64_t count, void (*work)(void*, int64_t), void* context);

}  // namespace gsm
