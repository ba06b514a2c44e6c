// What the portable kernels share: any chip from sm_80 on, any shape, 16-bit types on the matrix unit (mma.sync) and float32 in
// exact float32 arithmetic.
//
// A tile of 128 rows (pixels x samples) is multiplied with a block of columns. Its rows lie in a patch in shared memory, the
// tile's pixels and their halo, so that a tap is a shift of the rows; what they are multiplied with comes in stages, one a tap.
// All of it lies in rows of 128 bytes whose 16-byte piece p is stored at p ^ (row % 8), so that neither eight rows of one
// piece nor the eight pieces of one row meet in a memory bank.
#pragma once
#include <type_traits>
#include "common.cuh"

namespace smoe::portable {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int TILE_ROWS = 128;               // of a matrix
constexpr int ROW = 128;                     // bytes of a row in shared memory
constexpr int MOST_COLUMNS = 128;            // of a block
constexpr int STAGE = MOST_COLUMNS * ROW;    // bytes
constexpr int MOST_SHARED = 99 << 10;        // bytes that a CTA may have on every chip from sm_80 on (sm_86 has the least)
constexpr int TABLES = 1536;                 // bytes of shared memory before the patch
constexpr int LEFT_OUT = 0xffff;

template <class T>
constexpr int PIECE = 16 / sizeof(T);  // numbers in 16 bytes
template <class T>
constexpr int DEPTH = ROW / sizeof(T);  // numbers in a row

__device__ __forceinline__ int warp_number() { return threadIdx.x / 32; }
__device__ __forceinline__ int lane_number() { return threadIdx.x % 32; }

// Where a piece of a row lies, in bytes from the first row.
__device__ __forceinline__ int place(int row, int piece) { return row * ROW + ((piece ^ (row & 7)) << 4); }

// Division by a number that the host knows; right for n * by < 2^32.
struct Divisor {
  int by;
  uint32_t factor;
  __device__ __forceinline__ int of(int n) const { return by == 1 ? n : static_cast<int>(__umulhi(n, factor)); }
};
inline Divisor divisor(int by) { return {by, by > 1 ? static_cast<uint32_t>((uint64_t(1) << 32) / by + 1) : 0}; }

// What the host works out once for a tile.
struct Layout {
  int rows, columns, log_columns, log_batch;
  int halo;    // pixels beyond the tile that a patch has on the right (and a whole patch below)
  int band;    // rows of taps that a patch serves at a time
  int stages;  // 2 or 3
  int staging;  // bytes from the start of shared memory up to the stages
  Divisor across;  // by the width of a patch

  __device__ __forceinline__ int width() const { return columns + halo; }
  __device__ __forceinline__ int batch() const { return 1 << log_batch; }
  // The patch row of a row of the tile. Eight rows from a multiple of eight on are neighbours in the patch too.
  __device__ __forceinline__ int patch_row(int row) const {
    const int pixel = row >> log_batch;
    const int first = (pixel >> log_columns) * width() + (pixel & (columns - 1));
    return (first << log_batch) + (row & (batch() - 1));
  }
};

inline int log2_of(int number) {
  int log = 0;
  while ((1 << log) < number) log++;
  return log;
}

// False where the kernels have no layout for such a tile.
inline bool lay_out(const Tile& tile, int halo, Layout& layout) {
  layout = {tile.rows, tile.columns, log2_of(tile.columns), log2_of(tile.batch), halo, 0, 0, 0, divisor(tile.columns + halo)};
  return tile.rows > 0 && tile.rows * tile.columns * tile.batch == TILE_ROWS && 1 << layout.log_columns == tile.columns &&
         1 << layout.log_batch == tile.batch && tile.columns * tile.batch % 8 == 0;
}

// Chooses rows of taps a patch and stages, within the shared memory of any chip; returns its bytes, 0 where none fits.
inline int fit_stages(const Tile& tile, int ksize, int most, Layout& layout) {
  for (int band = ksize; band >= 1; band--)
    for (int stages = 3; stages >= 2; stages--) {
      const int patch = (tile.rows + band - 1) * (tile.columns + ksize - 1) * tile.batch * ROW;
      if (TABLES + patch + stages * STAGE > most) continue;
      layout.band = band, layout.stages = stages, layout.staging = TABLES + patch;
      return TABLES + patch + stages * STAGE;
    }
  return 0;
}

// Whether 32 bits number the rows of the weights and their pieces, and divide by F.
inline bool rows_fit(const Shape& s) {
  const int64_t rows = (int64_t)s.N * s.F;
  return rows <= INT32_MAX && rows * s.ksize * s.ksize * s.C / 4 < UINT32_MAX && ((int64_t)s.K + 1) * s.F * s.F <= UINT32_MAX;
}

inline bool is_aligned(const void* pointer, int64_t row_bytes) { return ((uintptr_t)pointer | row_bytes) % 16 == 0; }

// `launch` with a number of the type; UNSUPPORTED for one that is not known.
template <class Launch>
int of_type(int type, const Launch& launch) {
  switch (type) {
    case FLOAT32: return launch(float());
    case BFLOAT16: return launch(__nv_bfloat16());
    case FLOAT16: return launch(__half());
    default: return UNSUPPORTED;
  }
}

// 16 bytes from global to shared memory, of which `count` numbers exist (more or fewer than there is room for).
template <class T>
__device__ __forceinline__ void copy_piece(char* to, const T* from, int count, bool aligned) {
  if (aligned) {
    copy16(shared_address(to), from, count > 0 ? 16 : 0);
    return;
  }
  alignas(16) T numbers[PIECE<T>];
#pragma unroll
  for (int i = 0; i < PIECE<T>; i++) numbers[i] = i < count ? from[i] : T(0.f);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(numbers);
}

template <class T>
struct Map {  // [samples, height, width, channels]
  const T* data;
  int height, width, channels, wrap;
  bool aligned;

  __device__ __forceinline__ int wrapped(int w) const {
    return wrap && (unsigned)w >= (unsigned)width ? (w % width + width) % width : w;
  }
  __device__ __forceinline__ bool has(int h, int w) const {
    return (unsigned)h < (unsigned)height && (unsigned)w < (unsigned)width;
  }
  __device__ __forceinline__ int64_t offset(int sample, int h, int w) const {
    return (((int64_t)sample * height + h) * width + w) * channels;
  }
};

// Starts copies of DEPTH channels of `height` rows of a patch from (top, left) on; what lies outside becomes zero. Channels
// beyond the last are filled with zeros up to a multiple of 16.
template <class T>
__device__ void load_patch(char* patch, const Map<T>& map, const Layout& layout, int height, int top, int left,
                           int first_sample, int samples, int first_channel) {
  const int piece = threadIdx.x % 8, channel = first_channel + piece * PIECE<T>;
  const int rows = height * layout.width() << layout.log_batch;
  if (channel >= (map.channels + 15) / 16 * 16) return;
  const T* data = map.data + map.offset(first_sample, 0, 0) + channel;
  const int64_t sample_stride = map.offset(1, 0, 0);
  for (int row = threadIdx.x / 8; row < rows; row += THREADS / 8) {
    const int sample = row & (layout.batch() - 1), pixel = row >> layout.log_batch, down = layout.across.of(pixel);
    const int h = top + down, w = map.wrapped(left + pixel - down * layout.width());
    const bool inside = map.has(h, w) && sample < samples && channel < map.channels;
    const T* from = inside ? data + sample * sample_stride + (int64_t)(h * map.width + w) * map.channels : map.data;
    copy_piece(patch + place(row, piece), from, inside ? map.channels - channel : 0, map.aligned);
  }
}

__device__ __forceinline__ void clear_rows(char* rows, int count) {
  for (int i = threadIdx.x; i < count * (ROW / 16); i += THREADS) reinterpret_cast<uint4*>(rows)[i] = uint4{0, 0, 0, 0};
}

constexpr int UNIT = 1024;                    // bytes of values that a warp of `expand` takes at a time
constexpr int UNITS = WARPS * 2 * UNIT;       // bytes of shared memory that it needs for them

// What `expand` works on.
template <class T>
struct Gradient {
  const T* data;          // of the first sample
  int64_t sample_stride;  // numbers from a sample to the next
  int K, samples;
  Divisor filters;        // F
  bool aligned;
};

// The gradient's values, [.., K F], put where their experts' columns are: value c of pixel q belongs to column
// slots[c / F] F + c % F, of which `columns` from `first` on are wanted. `locate(q, slots, offset)` gives a pixel's slots and
// its values' offset in the data, or false. Columns lie in rows (q, sample), DEPTH of them in each block of `block_bytes`.
// Each warp takes units of a few samples of 128 values of a pixel, and, STAGED, fetches the next to `raw` (UNITS bytes) while
// it puts away this one.
template <bool STAGED, class T, class Locate>
__device__ __forceinline__ void expand(char* to, int block_bytes, char* raw, const Gradient<T>& g, int pixels, int log_batch,
                                       int first, int columns, const Locate& locate) {
  constexpr int VALUES = 128, SAMPLES = UNIT / (VALUES * (int)sizeof(T)), EACH = VALUES / 32;
  const int lane = lane_number(), F = g.filters.by, outputs = g.K * F, blocks = (outputs + VALUES - 1) / VALUES;
  const int parts = (g.samples + SAMPLES - 1) / SAMPLES;
  char* own = raw + warp_number() * 2 * UNIT;
  int q = warp_number(), block = 0, part = 0;  // the next unit
  int slot[EACH];                              // its slots
  const T* values = nullptr;                   // and its values

  auto start = [&](int buffer) {
    const uint16_t* slots;
    int64_t offset;
    const bool there = q < pixels && locate(q, slots, offset);
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int c = block * VALUES + lane + 32 * i;
      slot[i] = there && c < outputs ? __ldg(slots + g.filters.of(c)) : LEFT_OUT;
    }
    values = g.data + (there ? offset : 0) + part * SAMPLES * g.sample_stride + block * VALUES;
    if (!there || !STAGED) return;
#pragma unroll
    for (int i = 0; i < UNIT / 16 / 32; i++) {
      constexpr int PIECES = VALUES / PIECE<T>;
      const int piece = lane + 32 * i, sample = piece / PIECES, c = piece % PIECES * PIECE<T>;
      const int left = outputs - block * VALUES - c;
      if (part * SAMPLES + sample < g.samples && left > 0)
        copy_piece(own + buffer * UNIT + piece * 16, values + sample * g.sample_stride + c, left, g.aligned);
    }
  };

  start(0);
  commit_copies();
  for (int buffer = 0; q < pixels; buffer ^= 1) {
    int place_of[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++) {
      const int c = block * VALUES + lane + 32 * i;
      const int column = (slot[i] - g.filters.of(c)) * F + c - first;
      const bool wanted = slot[i] != LEFT_OUT && (unsigned)column < (unsigned)columns;
      place_of[i] = wanted ? column / DEPTH<T> * block_bytes + column % DEPTH<T> * (int)sizeof(T) : -1;
    }
    const int row = (q << log_batch) + part * SAMPLES, samples = min(SAMPLES, g.samples - part * SAMPLES);
    const T* now = STAGED ? reinterpret_cast<const T*>(own + buffer * UNIT) : values;
    const int64_t stride = STAGED ? VALUES : g.sample_stride;
    if (++part == parts) {
      part = 0;
      if (++block == blocks) block = 0, q += WARPS;
    }
    start(buffer ^ 1);
    commit_copies();
    wait_copies<1>();
    __syncwarp();
#pragma unroll
    for (int sample = 0; sample < SAMPLES; sample++) {
      if (sample >= samples) break;
      char* to_row = to + (row + sample) * ROW;
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (place_of[i] >= 0)
          *reinterpret_cast<T*>(to_row + (place_of[i] ^ ((row + sample) & 7) << 4)) = now[sample * stride + lane + 32 * i];
    }
    __syncwarp();
  }
}

// sum += a b, of 16 x 16 and 16 x 8 numbers; the last argument says of what type.
__device__ __forceinline__ void matrix_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                               __nv_bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void matrix_product(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ __nv_bfloat162 two(float a, float b, __nv_bfloat16) { return __floats2bfloat162_rn(a, b); }
__device__ __forceinline__ __half2 two(float a, float b, __half) { return __floats2half2_rn(a, b); }

__device__ __forceinline__ float4 load4(const char* from) { return *reinterpret_cast<const float4*>(from); }

}  // namespace smoe::portable
