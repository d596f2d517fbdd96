// gsm_run: checks a call, lays its columns out, and hands strips of work to the kernels.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "layer.h"

namespace gsm {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool supported(int isa) {
#ifdef GSM_X86
  if (isa == GSM_AVX512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           supported(GSM_AVX2);
  if (isa == GSM_AVX2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return isa == GSM_PORTABLE;
}

int best_isa() {
  for (int isa = GSM_AVX512; isa > GSM_PORTABLE; --isa)
    if (supported(isa)) return isa;
  return GSM_PORTABLE;
}

std::atomic<int> chosen_isa{best_isa()};

const Kernels& kernels() {
#ifdef GSM_X86
  if (chosen_isa == GSM_AVX512) return kernels_avx512;
  if (chosen_isa == GSM_AVX2) return kernels_avx2;
#endif
  return kernels_portable;
}

// Scratch memory of a thread, kept from call to call: fresh pages can cost more than a small layer.
float* scratch(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> memory;
  thread_local int64_t size = 0;
  if (size < floats) {
    memory.reset();
    size = 0;
    const size_t bytes = size_t(divide_up(floats, 16)) * 64;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (memory) size = floats;
  }
  return memory.get();
}

struct Call {
  Job job;
  std::vector<Plane> planes;
  std::vector<int32_t> offsets;
  int64_t reach = 0;  // how many columns behind its own an output reads
};

// Where a tap finds its input: taps whose shift is a whole number of strides share a plane.
struct Tap {
  int32_t row, column;  // of the plane
  int64_t shift_h, shift_w;
};

Tap tap(const gsm_layer& l, int64_t i, int64_t j) {
  const int64_t h = i * l.dilation_h, w = j * l.dilation_w;
  return {int32_t(h % l.stride_h), int32_t(w % l.stride_w), h / l.stride_h, w / l.stride_w};
}

void lay_out_columns(Call& call) {
  Job& job = call.job;
  const gsm_layer& l = job.packed->layer;
  int64_t reach_h = 0, reach_w = 0;
  for (int64_t i = 0; i < l.kernel_h; ++i)
    for (int64_t j = 0; j < l.kernel_w; ++j) {
      const Tap t = tap(l, i, j);
      reach_h = std::max(reach_h, t.shift_h);
      reach_w = std::max(reach_w, t.shift_w);
    }
  // At stride 1 the padding behind a row is the padding before the next one, and so for images.
  const int64_t shared_h = l.stride_h == 1 ? std::min(reach_h, job.pad_h) : 0;
  const int64_t shared_w = l.stride_w == 1 ? std::min(reach_w, job.pad_w) : 0;
  job.rows = job.out_height + reach_h - shared_h;
  job.pitch = job.out_width + reach_w - shared_w;
  call.reach = reach_h * job.pitch + reach_w;
  job.columns = ((job.batch - 1) * job.rows + job.out_height - 1) * job.pitch + job.out_width;
}

// Whether a 1x1 convolution can read its input where it is: maps of whole vectors, whose channels do
// not all fall on the same few sets of the caches, as they do 8 lines of a cache apart.
bool readable_in_place(const Job& job) {
  const gsm_layer& l = job.packed->layer;
  const bool pointwise = l.kernel_h == 1 && l.kernel_w == 1 && !l.pad_h && !l.pad_w;
  const int64_t size = job.height * job.width;
  return pointwise && l.stride_h == 1 && l.stride_w == 1 && !job.linear && size % 16 == 0 &&
         size / 16 % 8 != 0 && reinterpret_cast<uintptr_t>(job.x) % 64 == 0;
}

// After the strips are known: how much of every plane a strip needs, and where taps begin in it.
void lay_out_planes(Call& call, int64_t strip_columns) {
  Job& job = call.job;
  const gsm_layer& l = job.packed->layer;
  if (job.in_place) {
    job.channel_floats = job.height * job.width;
    call.offsets.reserve(size_t(job.packed->block_channels));
    for (int64_t c = 0; c < job.packed->block_channels; ++c)
      call.offsets.push_back(int32_t(c * job.channel_floats));
    job.offsets = call.offsets.data();
    return;
  }
  const size_t taps = size_t(l.kernel_h) * l.kernel_w;
  std::vector<int64_t> within;
  std::vector<size_t> plane_of;
  within.reserve(taps);
  plane_of.reserve(taps);
  for (int64_t i = 0; i < l.kernel_h; ++i) {
    for (int64_t j = 0; j < l.kernel_w; ++j) {
      const Tap t = tap(l, i, j);
      size_t p = 0;
      while (p < call.planes.size() && (call.planes[p].row != t.row ||
                                        call.planes[p].column != t.column))
        ++p;
      if (p == call.planes.size()) call.planes.push_back({t.row, t.column, 0, 0});
      within.push_back(t.shift_h * job.pitch + t.shift_w);
      plane_of.push_back(p);
      call.planes[p].length = std::max(call.planes[p].length, strip_columns + within.back());
    }
  }
  for (Plane& plane : call.planes) {
    plane.start = job.channel_floats;
    job.channel_floats += divide_up(plane.length, 16) * 16;
  }
  // An odd number of 512 bytes apart, channels take turns in the sets of the first-level cache; at
  // a power of two all of them would fall on the same few.
  if (job.channel_floats > 128)
    job.channel_floats = divide_up(job.channel_floats, 128) / 2 * 256 + 128;
  const int64_t channels = job.packed->block_channels;
  call.offsets.reserve(size_t(channels) * taps);
  for (int64_t c = 0; c < channels; ++c)
    for (size_t t = 0; t < taps; ++t)
      call.offsets.push_back(
          int32_t(c * job.channel_floats + call.planes[plane_of[t]].start + within[t]));
  job.planes = call.planes.data();
  job.plane_count = int64_t(call.planes.size());
  job.offsets = call.offsets.data();
}

bool lay_out_strips(Call& call, const Kernels& k, int threads) {
  Job& job = call.job;
  const Header& h = *job.packed;
  const gsm_layer& l = h.layer;
  job.tile_units = h.format == GSM_ROWS ? k.max_tile_rows : k.max_tile_block16;
  job.units = divide_up(job.columns, k.width);

  // A strip's input, and the sums of the panels that pass over it together, share the second-level
  // cache: 256 KB each, and half or twice as much is within a tenth of it. A strip is at least one
  // tile, and at least twice what it reads beside it.
  const int64_t input_floats = 65536, sum_floats = 65536;
  const int64_t panels = int64_t(h.panels) * h.layer.groups;
  const int64_t columns = input_floats / (l.in_channels / l.groups);
  const int64_t strip_units =
      std::max({job.tile_units, columns / k.width, divide_up(2 * call.reach, k.width)});
  const int64_t pieces = job.in_place ? job.batch : 1;  // no strip has columns of two images then
  job.strips = pieces * divide_up(job.units / pieces, strip_units);
  const int64_t widest = divide_up(job.units, job.strips);
  job.chunks = threads == 1 || job.strips >= 4 * threads
                   ? 1
                   : std::min<int64_t>(panels, divide_up(2 * threads, job.strips));
  job.sum_panels = std::max<int64_t>(1, sum_floats / (widest * k.width * kPanel));

  lay_out_planes(call, widest * k.width);
  const int64_t channels = std::max(l.in_channels / l.groups, h.block_channels);
  job.input_floats = job.in_place ? 0 : channels * job.channel_floats;
  job.sum_floats = widest * job.sum_panels * k.width * kPanel;
  job.value_floats = h.storage == GSM_F32 ? 0 : int64_t(call.offsets.size()) * kPanel;
  return h.block_channels * job.channel_floats <= std::numeric_limits<int32_t>::max();
}

struct Run {
  const Job* job;
  const Kernels* kernels;
  std::atomic<int32_t> status{GSM_OK};
};

void run_strip(void* context, int64_t i) {
  Run& run = *static_cast<Run*>(context);
  const Job& job = *run.job;
  float* memory = scratch(job.input_floats + job.sum_floats + job.value_floats);
  if (memory)
    run.kernels->strip(job, i / job.chunks, i % job.chunks, memory);
  else
    run.status = GSM_NO_MEMORY;
}

// Several panels at a time, as one of them may be a microsecond's work.
constexpr int64_t kFewPanels = 4;

void run_few(void* context, int64_t i) {
  Run& run = *static_cast<Run*>(context);
  const int64_t end = std::min<int64_t>(run.job->packed->panels, (i + 1) * kFewPanels);
  for (int64_t p = i * kFewPanels; p < end; ++p) run.kernels->few(*run.job, p);
}

struct PoolRun {
  PoolJob job;
  void (*line)(const PoolJob&, int64_t);
};

void run_pool(void* context, int64_t i) {
  const PoolRun& run = *static_cast<PoolRun*>(context);
  run.line(run.job, i);
}

// Up to which batch a linear layer is cheaper without columns in vectors.
int64_t few_columns(int format) {
  if (format == GSM_LANES) return std::numeric_limits<int64_t>::max();
  return format == GSM_BLOCK16 ? 8 : 2;
}

int32_t run(const Header& h, const float* x, int64_t batch, int64_t height, int64_t width,
            const float* bias, const float* add, bool relu, float* y, int threads) {
  const gsm_layer& l = h.layer;
  const char* base = reinterpret_cast<const char*>(&h);
  Call call{};
  Job& job = call.job;
  job.packed = &h;
  job.starts = reinterpret_cast<const uint32_t*>(base + h.starts);
  job.indices = reinterpret_cast<const uint16_t*>(base + h.indices);
  job.masks = reinterpret_cast<const uint16_t*>(base + h.masks);
  job.values = base + h.values;
  job.scales = reinterpret_cast<const float*>(base + h.scales);
  job.x = x, job.bias = bias, job.add = add, job.y = y, job.relu = relu;
  job.batch = batch, job.channels = l.in_channels, job.outputs = l.out_channels;
  job.height = height, job.width = width;
  job.stride_h = l.stride_h, job.stride_w = l.stride_w;
  job.pad_h = l.pad_h, job.pad_w = l.pad_w;

  const int64_t padded_h = height + 2 * job.pad_h - (l.kernel_h - 1) * int64_t(l.dilation_h) - 1;
  const int64_t padded_w = width + 2 * job.pad_w - (l.kernel_w - 1) * int64_t(l.dilation_w) - 1;
  if (padded_h < 0 || padded_w < 0) return GSM_BAD_ARGUMENT;
  job.out_height = padded_h / l.stride_h + 1;
  job.out_width = padded_w / l.stride_w + 1;
  const bool pointwise = l.kernel_h == 1 && l.kernel_w == 1 && !l.pad_h && !l.pad_w;
  job.linear = pointwise && height == 1 && width == 1;
  if (h.format == GSM_LANES && !job.linear) return GSM_UNSUPPORTED;
  if (batch == 0) return GSM_OK;
  if (pointwise && l.stride_h == 1 && l.stride_w == 1) {  // an image is one long row
    job.width = job.out_width = height * width;
    job.height = job.out_height = 1;
  }

  const Kernels& k = kernels();
  Run shared{&job, &k};
  lay_out_columns(call);
  job.in_place = readable_in_place(job);
  if (job.linear && l.groups == 1 && job.columns <= few_columns(h.format)) {
    parallel(threads, divide_up(h.panels, kFewPanels), run_few, &shared);
  } else {
    if (!lay_out_strips(call, k, threads)) return GSM_UNSUPPORTED;
    parallel(threads, job.strips * job.chunks, run_strip, &shared);
  }
  return shared.status;
}

}  // namespace
}  // namespace gsm

using namespace gsm;

int32_t gsm_get_isa(void) { return chosen_isa; }

int32_t gsm_set_isa(int32_t isa) {
  if (isa < GSM_PORTABLE || isa > GSM_AVX512) return GSM_BAD_ARGUMENT;
  if (!supported(isa)) return GSM_UNSUPPORTED;
  chosen_isa = isa;
  return GSM_OK;
}

int32_t gsm_run(const void* packed, const float* x, int64_t batch, int64_t height, int64_t width,
                const float* bias, const float* add, int32_t relu, float* y, int32_t threads) {
  const Header* h = header(packed);
  if (!h) return GSM_BAD_PACKED;
  constexpr int64_t limit = int64_t(1) << 31;
  if (batch < 0 || height < 1 || width < 1 || threads < 1) return GSM_BAD_ARGUMENT;
  if (batch >= limit || height >= limit || width >= limit) return GSM_BAD_ARGUMENT;
  if (batch && (!x || !y)) return GSM_BAD_ARGUMENT;
  try {
    return run(*h, x, batch, height, width, bias, add, relu != 0, y, threads);
  } catch (const std::bad_alloc&) {
    return GSM_NO_MEMORY;
  }
}

int32_t gsm_run_steps(const gsm_step* steps, int64_t count, float* const* bases, int32_t threads) {
  for (const gsm_step* s = steps; s != steps + count; ++s) {
    const float* add = s->add_base < 0 ? nullptr : bases[s->add_base] + s->add;
    const int32_t status =
        gsm_run(s->packed, bases[s->x_base] + s->x, s->batch, s->height, s->width, s->bias, add,
                s->relu, bases[s->y_base] + s->y, threads);
    if (status) return status;
  }
  return GSM_OK;
}

int32_t gsm_max_pool(const gsm_pool* pool, int32_t channels_last, const float* x, float* y,
                     int32_t threads) {
  constexpr int64_t limit = int64_t(1) << 31;
  if (!pool || threads < 1) return GSM_BAD_ARGUMENT;
  const gsm_pool& p = *pool;
  for (int64_t size : {p.channels, p.height, p.width, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w})
    if (size < 1 || size >= limit) return GSM_BAD_ARGUMENT;
  if (p.batch < 0 || p.batch >= limit || p.pad_h < 0 || p.pad_w < 0) return GSM_BAD_ARGUMENT;
  if (2 * p.pad_h > p.kernel_h || 2 * p.pad_w > p.kernel_w) return GSM_BAD_ARGUMENT;
  const int64_t room_h = p.height + 2 * p.pad_h - p.kernel_h;
  const int64_t room_w = p.width + 2 * p.pad_w - p.kernel_w;
  if (room_h < 0 || room_w < 0 || (p.batch && (!x || !y))) return GSM_BAD_ARGUMENT;
  PoolRun run = {{p, room_h / p.stride_h + 1, room_w / p.stride_w + 1, x, y},
                 channels_last ? kernels().max_pool_last : kernels().max_pool_first};
  const int64_t planes = channels_last ? p.batch : p.batch * p.channels;
  parallel(threads, planes * run.job.out_height, run_pool, &run);
  return GSM_OK;
}
