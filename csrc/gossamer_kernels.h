/* The C interface of Gossamer's sparse CPU kernels.
 *
 * A layer is a convolution in NCHW; a linear layer is a 1x1 convolution of 1x1 maps. Its dense fp32
 * weight is packed once, into memory of the caller, and run many times:
 *
 *     bytes = gsm_pack_bytes(&layer, format, storage, weight);
 *     gsm_pack(&layer, format, storage, weight, packed, bytes);
 *     gsm_run(packed, x, batch, height, width, bias, add, relu, y, threads);
 *
 * A packed layer holds no pointers and depends on no instruction set: it may be copied, saved and
 * loaded on another machine of the same byte order (check what was loaded with gsm_check). Pointers
 * need the alignment of their type, no more; a packed layer that of float. Functions return GSM_OK
 * or a negative gsm_status. They may be called from several threads at once. A result depends on
 * the instruction set and on the shape of the call, not on the number of threads.
 */
#ifndef GOSSAMER_KERNELS_H
#define GOSSAMER_KERNELS_H

#include <stdint.h>

#define GSM_ABI_VERSION 2

#if defined(__GNUC__)
#define GSM_API __attribute__((visibility("default")))
#else
#define GSM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  GSM_OK = 0,
  GSM_BAD_ARGUMENT = -1, /* a size, count or flag out of range */
  GSM_BAD_PACKED = -2,   /* not a packed layer of this version, or a damaged one */
  GSM_UNSUPPORTED = -3,  /* this format cannot hold or run such a layer; this CPU lacks the ISA */
  GSM_NO_MEMORY = -4
} gsm_status;

/* How the non-zeros are laid out. Every format computes the same function. */
typedef enum {
  /* One list of non-zeros per output. Any convolution; the one for many columns (batch x map). */
  GSM_ROWS = 0,
  /* Outputs in panels of 16 which share their lists: made for weights whose zeros come in columns
   * of 16 outputs. Any convolution, any batch. An input that one of the 16 needs is multiplied in
   * all of them, so that the zeros inside a block meet NaN and infinity as stored zeros do. */
  GSM_BLOCK16 = 1,
  /* Outputs in panels of 16 lanes, inputs in windows of 16, each lane with its own places in the
   * window. Linear layers of small batch: unstructured zeros, and N:M without any padding when M
   * divides 16. */
  GSM_LANES = 2
} gsm_format;

/* How a value is stored. Products and sums are fp32 always. */
typedef enum {
  GSM_F32 = 0,
  GSM_BF16 = 1, /* rounded to nearest even */
  GSM_INT8 = 2  /* with one fp32 scale per output: largest absolute value / 127 */
} gsm_storage;

typedef enum { GSM_PORTABLE = 0, GSM_AVX2 = 1, GSM_AVX512 = 2 } gsm_isa;

/* weight: (out_channels, in_channels / groups, kernel_h, kernel_w), contiguous. */
typedef struct {
  int32_t out_channels, in_channels, groups;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
} gsm_layer;

GSM_API int32_t gsm_abi_version(void);
GSM_API const char* gsm_status_text(int32_t status);

/* The instruction set that gsm_run uses: the best of this CPU until set. One for the process. */
GSM_API int32_t gsm_get_isa(void);
GSM_API int32_t gsm_set_isa(int32_t isa);

/* Bytes that gsm_pack needs for this weight; negative: a gsm_status. */
GSM_API int64_t gsm_pack_bytes(const gsm_layer* layer, int32_t format, int32_t storage,
                               const float* weight);
GSM_API int32_t gsm_pack(const gsm_layer* layer, int32_t format, int32_t storage,
                         const float* weight, void* packed, int64_t bytes);

/* Whether these bytes are a packed layer that gsm_run can safely read. */
GSM_API int32_t gsm_check(const void* packed, int64_t bytes);
GSM_API int32_t gsm_packed_layer(const void* packed, gsm_layer* layer, int32_t* format,
                                 int32_t* storage);
/* The dense weight again, as rounded by the storage. */
GSM_API int32_t gsm_unpack(const void* packed, float* weight);

/* y = relu(conv(x) + bias + add), the last three as wanted.
 * x: (batch, in_channels, height, width); y and add: (batch, out_channels, out_h, out_w);
 * bias: (out_channels,). bias and add may be NULL; add may be y itself; y must not overlap x.
 * threads: at most so many, at least 1. Where an OpenMP runtime is loaded (PyTorch's), its pool
 * does the work, so that there are never two pools on the same cores. */
GSM_API int32_t gsm_run(const void* packed, const float* x, int64_t batch, int64_t height,
                        int64_t width, const float* bias, const float* add, int32_t relu, float* y,
                        int32_t threads);

/* Several calls of gsm_run, one after the other. Inputs and outputs are bases[...] + a number of
 * floats; an add_base of -1: none. */
typedef struct {
  const void* packed;
  const float* bias;
  int64_t batch, height, width, x, add, y;
  int32_t x_base, add_base, y_base, relu;
} gsm_step;

GSM_API int32_t gsm_run_steps(const gsm_step* steps, int64_t count, float* const* bases,
                              int32_t threads);

/* Maxima of windows, NaN where there is one. y is (batch, channels, out_h, out_w), and so is x, or it
 * has its channels last, as a dense layer before sparse ones may give them. No window may lie wholly
 * in the padding. */
typedef struct {
  int64_t batch, channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
} gsm_pool;

GSM_API int32_t gsm_max_pool(const gsm_pool* pool, int32_t channels_last, const float* x, float* y,
                             int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
