// Packing: a dense weight into one of the formats of layer.h, and back.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "layer.h"

namespace gsm {
namespace {

constexpr uint64_t kMagic = 0x676f7373616d0000u + GSM_ABI_VERSION;

int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t taps(const gsm_layer& layer) { return int64_t(layer.kernel_h) * layer.kernel_w; }
int64_t inputs(const gsm_layer& layer) { return layer.in_channels / layer.groups; }
int64_t outputs(const gsm_layer& layer) { return layer.out_channels / layer.groups; }

int64_t value_bytes(int storage) { return storage == GSM_F32 ? 4 : storage == GSM_BF16 ? 2 : 1; }

int64_t entry_values(int format) { return format == GSM_ROWS ? 1 : kPanel; }
int64_t entry_index_bytes(int format) { return format == GSM_LANES ? kPanel : 2; }

bool storable(const gsm_layer& layer, int format) {
  if (format == GSM_LANES) return taps(layer) == 1 && layer.groups == 1;
  return taps(layer) <= kTableLimit;
}

// Channels per block, as even as can be. 128 columns of 64 channels (with the columns beside them that
// a k x k kernel reads, of 32) fill two thirds of a 48 KB first-level cache; behind 512 channels maps
// are smaller than that. More of them where the zeros leave so few entries to a list that loading and
// storing its sums would cost more than those save: 24 or 26 were best from 50 % to 95 % zeros.
// block16 loads an input once for 16 outputs and needs no such care.
int64_t channels_per_block(const gsm_layer& layer, int format, const float* weight) {
  if (format == GSM_LANES) return kWindow;
  int64_t wanted = kTableLimit;
  if (format == GSM_ROWS) {
    const int64_t pairs = layer.out_channels * inputs(layer), size = pairs * taps(layer);
    int64_t entries = 1;
    for (int64_t i = 0; i < size; ++i) entries += weight[i] != 0;
    const int64_t least = taps(layer) == 1 || inputs(layer) >= 512 ? 64 : 32;
    wanted = std::clamp<int64_t>((taps(layer) == 1 ? 26 : 24) * pairs / entries, least, 512);
  }
  const int64_t most = std::max<int64_t>(1, std::min(wanted, kTableLimit / taps(layer)));
  return divide_up(inputs(layer), divide_up(inputs(layer), most));
}

// The layout for a layer, all but the number of entries.
Header layout(const gsm_layer& layer, int format, int storage, int64_t block_channels) {
  Header h{};
  h.magic = kMagic;
  h.layer = layer;
  h.format = format;
  h.storage = storage;
  h.panels = int32_t(divide_up(outputs(layer), kPanel));
  h.block_channels = int32_t(block_channels);
  h.blocks = int32_t(divide_up(inputs(layer), h.block_channels));
  h.lists = format == GSM_ROWS ? int32_t(outputs(layer)) : h.panels;
  return h;
}

int64_t list_count(const Header& h) { return int64_t(h.layer.groups) * h.blocks * h.lists; }

void place(Header& h, int64_t entries) {
  h.entries = entries;
  h.starts = aligned(sizeof(Header));
  h.indices = aligned(h.starts + 4 * (list_count(h) + 1));
  h.masks = aligned(h.indices + entries * entry_index_bytes(h.format));
  h.values = aligned(h.masks + (h.format == GSM_LANES ? 2 * entries : 0));
  h.scales = aligned(h.values + entries * entry_values(h.format) * value_bytes(h.storage));
  h.bytes = aligned(h.scales + (h.storage == GSM_INT8 ? 4 * int64_t(h.layer.out_channels) : 0));
}

// One value of one entry: which output and which (channel, tap) of the dense weight it stands for.
struct Place {
  int64_t entry, lane, output, input;  // input: (channel in the group) * taps + tap
};

// Calls visit(place) for every stored value of the weight and start(list, entry) before every list.
// Outputs past the last one of a panel are never visited. Returns the number of entries.
template <class Start, class Visit>
int64_t walk(const Header& h, const float* weight, Start start, Visit visit) {
  const int64_t t = taps(h.layer), row = inputs(h.layer) * t, rows = outputs(h.layer);
  const int64_t block = h.block_channels * t;
  const int64_t list_rows = h.format == GSM_ROWS ? 1 : kPanel;
  int64_t entry = 0, list = 0;

  auto shared = [&](int64_t first, int64_t lanes, int64_t from, int64_t to) {
    for (int64_t k = from; k < to; ++k) {
      bool any = false;
      for (int64_t l = 0; l < lanes; ++l) any |= weight[(first + l) * row + k] != 0;
      if (!any) continue;
      for (int64_t l = 0; l < lanes; ++l) visit(Place{entry, l, first + l, k});
      ++entry;
    }
  };
  auto slots = [&](int64_t first, int64_t lanes, int64_t from, int64_t to) {
    int64_t longest = 0;
    for (int64_t l = 0; l < lanes; ++l) {
      int64_t slot = 0;
      for (int64_t k = from; k < to; ++k)
        if (weight[(first + l) * row + k] != 0) visit(Place{entry + slot++, l, first + l, k});
      longest = std::max(longest, slot);
    }
    entry += longest;
  };

  auto one_list = [&](int64_t group, int64_t b, int64_t i) {
    const int64_t first = group * rows + i * list_rows;
    const int64_t lanes = std::min(list_rows, (group + 1) * rows - first);
    const int64_t from = b * block, to = std::min(row, from + block);
    start(list++, entry);
    if (h.format == GSM_LANES)
      slots(first, lanes, from, to);
    else
      shared(first, lanes, from, to);
  };
  // lanes: the windows of a panel follow each other; otherwise the lists of a block do.
  if (h.format == GSM_LANES) {
    for (int64_t i = 0; i < h.lists; ++i)
      for (int64_t b = 0; b < h.blocks; ++b) one_list(0, b, i);
  } else {
    for (int64_t group = 0; group < h.layer.groups; ++group)
      for (int64_t b = 0; b < h.blocks; ++b)
        for (int64_t i = 0; i < h.lists; ++i) one_list(group, b, i);
  }
  start(list, entry);
  return entry;
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t value) {
  const uint32_t bits = uint32_t(value) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

int32_t checked_arguments(const gsm_layer* layer, int format, int storage, const float* weight) {
  if (!layer || !weight || !valid(*layer)) return GSM_BAD_ARGUMENT;
  if (format < GSM_ROWS || format > GSM_LANES) return GSM_BAD_ARGUMENT;
  if (storage < GSM_F32 || storage > GSM_INT8) return GSM_BAD_ARGUMENT;
  return storable(*layer, format) ? GSM_OK : GSM_UNSUPPORTED;
}


}  // namespace

bool valid(const gsm_layer& l) {
  const int32_t positive[] = {l.out_channels, l.in_channels, l.groups,     l.kernel_h,  l.kernel_w,
                              l.stride_h,     l.stride_w,    l.dilation_h, l.dilation_w};
  for (int32_t size : positive)
    if (size < 1 || size > (1 << 24)) return false;
  for (int32_t size : {l.pad_h, l.pad_w})
    if (size < 0 || size > (1 << 16)) return false;
  if (l.in_channels % l.groups || l.out_channels % l.groups) return false;
  const double reach_h = double(l.kernel_h) * l.dilation_h;
  const double reach_w = double(l.kernel_w) * l.dilation_w;
  return reach_h < (1 << 24) && reach_w < (1 << 24) && taps(l) <= (1 << 24);
}

const Header* header(const void* packed) {
  const Header* h = static_cast<const Header*>(packed);
  return h && h->magic == kMagic ? h : nullptr;
}

}  // namespace gsm

using namespace gsm;

int64_t gsm_pack_bytes(const gsm_layer* layer, int32_t format, int32_t storage,
                       const float* weight) {
  if (int32_t bad = checked_arguments(layer, format, storage, weight)) return bad;
  Header h = layout(*layer, format, storage, channels_per_block(*layer, format, weight));
  const int64_t entries = walk(h, weight, [](int64_t, int64_t) {}, [](const Place&) {});
  if (entries > UINT32_MAX) return GSM_UNSUPPORTED;
  place(h, entries);
  return h.bytes;
}

int32_t gsm_pack(const gsm_layer* layer, int32_t format, int32_t storage, const float* weight,
                 void* packed, int64_t bytes) {
  if (int32_t bad = checked_arguments(layer, format, storage, weight)) return bad;
  if (!packed) return GSM_BAD_ARGUMENT;
  Header h = layout(*layer, format, storage, channels_per_block(*layer, format, weight));
  place(h, walk(h, weight, [](int64_t, int64_t) {}, [](const Place&) {}));
  if (bytes < h.bytes) return GSM_BAD_ARGUMENT;

  char* base = static_cast<char*>(packed);
  std::memset(base, 0, size_t(h.bytes));
  std::memcpy(base, &h, sizeof h);
  auto* starts = reinterpret_cast<uint32_t*>(base + h.starts);
  auto* masks = reinterpret_cast<uint16_t*>(base + h.masks);
  auto* scales = reinterpret_cast<float*>(base + h.scales);
  const int64_t t = taps(*layer), row = inputs(*layer) * t;
  if (storage == GSM_INT8) {
    for (int64_t o = 0; o < layer->out_channels; ++o) {
      float largest = 0;
      for (int64_t k = 0; k < row; ++k) {
        const float value = std::fabs(weight[o * row + k]);
        if (!std::isfinite(value)) return GSM_UNSUPPORTED;
        largest = std::max(largest, value);
      }
      scales[o] = largest / 127;
    }
  }

  const int64_t width = entry_values(format), block = h.block_channels * t;
  walk(
      h, weight, [&](int64_t list, int64_t entry) { starts[list] = uint32_t(entry); },
      [&](const Place& at) {
        const float value = weight[at.output * row + at.input];
        const int64_t i = at.entry * width + at.lane, index = at.input % block;
        if (format == GSM_LANES) {
          reinterpret_cast<uint8_t*>(base + h.indices)[i] = uint8_t(index);
          masks[at.entry] |= uint16_t(1u << at.lane);
        } else {
          reinterpret_cast<uint16_t*>(base + h.indices)[at.entry] = uint16_t(index);
        }
        char* values = base + h.values;
        if (storage == GSM_F32) reinterpret_cast<float*>(values)[i] = value;
        if (storage == GSM_BF16) reinterpret_cast<uint16_t*>(values)[i] = to_bf16(value);
        if (storage == GSM_INT8) {
          const float scale = scales[at.output];
          reinterpret_cast<int8_t*>(values)[i] =
              int8_t(scale > 0 ? std::lrint(std::fmin(127, std::fmax(-127, value / scale))) : 0);
        }
      });
  return GSM_OK;
}

int32_t gsm_check(const void* packed, int64_t bytes) {
  if (!packed || bytes < int64_t(sizeof(Header))) return GSM_BAD_PACKED;
  const Header* h = header(packed);
  if (!h || h->bytes != bytes || h->entries < 0 || h->entries > UINT32_MAX) return GSM_BAD_PACKED;
  if (checked_arguments(&h->layer, h->format, h->storage, reinterpret_cast<const float*>(packed)))
    return GSM_BAD_PACKED;
  const int64_t channels = h->block_channels;
  if (channels < 1 || channels > kTableLimit || channels * taps(h->layer) > kTableLimit ||
      (h->format == GSM_LANES && channels != kWindow))
    return GSM_BAD_PACKED;
  Header expected = layout(h->layer, h->format, h->storage, channels);
  place(expected, h->entries);
  if (std::memcmp(&expected, h, sizeof expected)) return GSM_BAD_PACKED;

  const char* base = static_cast<const char*>(packed);
  const auto* starts = reinterpret_cast<const uint32_t*>(base + h->starts);
  const int64_t lists = list_count(*h);
  if (starts[0] || starts[lists] != h->entries) return GSM_BAD_PACKED;
  for (int64_t list = 0; list < lists; ++list)
    if (starts[list] > starts[list + 1]) return GSM_BAD_PACKED;
  const int64_t row = inputs(h->layer) * taps(h->layer), block = h->block_channels * taps(h->layer);
  const int64_t width = h->format == GSM_LANES ? kPanel : 1;
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t b = h->format == GSM_LANES ? list % h->blocks : list / h->lists % h->blocks;
    const int64_t limit = std::min(block, row - b * block);
    for (int64_t i = starts[list] * width; i < starts[list + 1] * width; ++i) {
      const int64_t index = h->format == GSM_LANES
                                ? reinterpret_cast<const uint8_t*>(base + h->indices)[i]
                                : reinterpret_cast<const uint16_t*>(base + h->indices)[i];
      if (index >= limit) return GSM_BAD_PACKED;
    }
  }
  return GSM_OK;
}

int32_t gsm_packed_layer(const void* packed, gsm_layer* layer, int32_t* format, int32_t* storage) {
  const Header* h = header(packed);
  if (!h) return GSM_BAD_PACKED;
  if (layer) *layer = h->layer;
  if (format) *format = h->format;
  if (storage) *storage = h->storage;
  return GSM_OK;
}

int32_t gsm_unpack(const void* packed, float* weight) {
  const Header* h = header(packed);
  if (!h) return GSM_BAD_PACKED;
  if (!weight) return GSM_BAD_ARGUMENT;
  const char* base = static_cast<const char*>(packed);
  const auto* starts = reinterpret_cast<const uint32_t*>(base + h->starts);
  const int64_t t = taps(h->layer), row = inputs(h->layer) * t, rows = outputs(h->layer);
  const int64_t width = entry_values(h->format), block = h->block_channels * t;
  std::memset(weight, 0, size_t(h->layer.out_channels * row) * sizeof(float));
  for (int64_t list = 0; list < list_count(*h); ++list) {
    const bool lanes = h->format == GSM_LANES;
    const int64_t b = lanes ? list % h->blocks : list / h->lists % h->blocks;
    const int64_t i = lanes ? list / h->blocks : list % h->lists;
    const int64_t group = lanes ? 0 : list / h->lists / h->blocks;
    const int64_t first = group * rows + i * width;
    const int64_t used = std::min(width, (group + 1) * rows - first);
    for (int64_t entry = starts[list]; entry < starts[list + 1]; ++entry) {
      for (int64_t l = 0; l < used; ++l) {
        const int64_t v = entry * width + l;
        const auto* masks = reinterpret_cast<const uint16_t*>(base + h->masks);
        if (lanes && !(masks[entry] >> l & 1)) continue;
        const int64_t index = lanes
                                  ? reinterpret_cast<const uint8_t*>(base + h->indices)[v]
                                  : reinterpret_cast<const uint16_t*>(base + h->indices)[entry];
        const char* values = base + h->values;
        float value = 0;
        if (h->storage == GSM_F32) value = reinterpret_cast<const float*>(values)[v];
        if (h->storage == GSM_BF16) value = from_bf16(reinterpret_cast<const uint16_t*>(values)[v]);
        if (h->storage == GSM_INT8)
          value = reinterpret_cast<const int8_t*>(values)[v] *
                  reinterpret_cast<const float*>(base + h->scales)[first + l];
        weight[(first + l) * row + b * block + index] = value;
      }
    }
  }
  return GSM_OK;
}

int32_t gsm_abi_version(void) { return GSM_ABI_VERSION; }

const char* gsm_status_text(int32_t status) {
  switch (status) {
    case GSM_OK: return "ok";
    case GSM_BAD_ARGUMENT: return "a size, count or flag is out of range";
    case GSM_BAD_PACKED: return "not a packed layer of this version, or a damaged one";
    case GSM_UNSUPPORTED: return "this format cannot hold or run such a layer on this machine";
    case GSM_NO_MEMORY: return "out of memory";
    default: return "unknown status";
  }
}
