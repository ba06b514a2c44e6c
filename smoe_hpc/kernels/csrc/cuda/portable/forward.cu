// y = the selected experts' filters applied to x, portably. A CTA makes tiles of 128 rows x blocks of up to 128 columns of the
// tile's union of experts, then stores of each row the columns that its pixel selects.
//
// Order of addition: channels in blocks of 64, in each the taps, in each tap the channels; float32: blocks of 32 channels, each
// summed apart.
#include "few.cuh"
#include "product.cuh"

namespace smoe::portable {

template <class T>
struct ForwardTask {
  Map<T> x;
  const T* w;
  T* y;
  Shape shape;
  Windows windows;
  Layout layout;
  int chunks;      // of samples, a tile's batch each
  bool per_sample;
  bool aligned;    // weights
  Divisor filters;
};

constexpr uint32_t NO_ROW = ~0u;

template <class T, int GROUPS>
struct ForwardSource {
  static constexpr bool EXPANDS = false;
  const ForwardTask<T>& task;
  int top, left, first_sample, samples, patches;
  uint32_t rows[GROUPS];  // of the weights that this thread loads; aligned: their first pieces

  __device__ __forceinline__ void start(int64_t window, int first, int columns) {
    const Shape& s = task.shape;
#pragma unroll
    for (int i = 0; i < GROUPS; i++) {
      const int inside = threadIdx.x / 8 + i * (THREADS / 8), slot = task.filters.of(first + inside);
      rows[i] = NO_ROW;
      if (inside >= columns) continue;
      const uint32_t row = task.windows.ids[window * task.windows.cap + slot] * s.F + first + inside - slot * s.F;
      rows[i] = task.aligned ? row * (uint32_t)(s.ksize * s.ksize * s.C / PIECE<T>) : row;
    }
  }

  __device__ __forceinline__ void prepare(int) const {}

  __device__ __forceinline__ void fill(char* to, char*, int patch, int row, int count) const {
    const Layout& l = task.layout;
    load_patch(to, task.x, l, l.rows + count - 1, top + row, left, first_sample, samples, patch * DEPTH<T>);
  }

  __device__ __forceinline__ void load(char* to, int patch, int shift) const {
    const Shape& s = task.shape;
    const int piece = threadIdx.x % 8, channel = patch * DEPTH<T> + piece * PIECE<T>;
    if (channel >= (s.C + 15) / 16 * 16) return;
    to += place(threadIdx.x / 8, piece);
    const T* tap = task.w + shift * s.C + channel;
    if (task.aligned) {
      const uint32_t address = shared_address(to);
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const bool there = rows[i] != NO_ROW && channel < s.C;
        copy16(address + i * (THREADS / 8 * ROW), there ? tap + (int64_t)rows[i] * PIECE<T> : task.w, there ? 16 : 0);
      }
    } else {
#pragma unroll
      for (int i = 0; i < GROUPS; i++) {
        const T* from = rows[i] != NO_ROW ? tap + (int64_t)rows[i] * (s.ksize * s.ksize) * s.C : task.w;
        copy_piece(to + i * (THREADS / 8 * ROW), from, rows[i] != NO_ROW ? s.C - channel : 0, false);
      }
    }
  }

  __device__ __forceinline__ uint32_t active(int patch, int) const {
    return (1u << (min(task.shape.C - patch * DEPTH<T>, DEPTH<T>) + 15) / 16) - 1;
  }
};

template <class T, int GROUPS, bool LONG>
__device__ void forward_columns(const ForwardTask<T>& task, char* shared, int64_t window, int top, int left,
                                int first_sample, int samples, int first, int columns) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const Layout& layout = task.layout;
  Product<T, false, GROUPS, LONG> product;
  product.start(layout);
  ForwardSource<T, GROUPS> source{task, top - s.off, left - s.off, first_sample, samples, (s.C + DEPTH<T> - 1) / DEPTH<T>, {}};
  source.start(window, first, columns);
  multiply(product, source, shared, layout, s.ksize);
  char* staging = shared + TABLES;
  const int pitch = 32 * GROUPS * (int)sizeof(T) + 16;
  product.write(staging, pitch);
  __syncthreads();

  const int outputs = s.K * s.F;
  for (int pixel = warp_number(); pixel < layout.rows * layout.columns; pixel += WARPS) {
    const int h = top + pixel / layout.columns, w = left + pixel % layout.columns;
    if (h >= s.Ho || w >= s.Wo) continue;
    const uint16_t* slots = v.slots + (window * layout.rows * layout.columns + pixel) * s.K;
    T* to = task.y + (((int64_t)first_sample * s.Ho + h) * s.Wo + w) * outputs;
    for (int from = lane_number(); from < outputs; from += 32 * 4) {
      int column[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = from + 32 * i, k = task.filters.of(c);
        const int slot = c < outputs ? __ldg(slots + k) : -1;
        column[i] = slot < 0 ? INT_MIN : slot == LEFT_OUT ? -1 : slot * s.F + c - k * s.F - first;
      }
      for (int sample = 0; sample < samples; sample++) {
        const char* row = staging + ((pixel << layout.log_batch) + sample) * pitch;
        T* out = to + (int64_t)sample * s.Ho * s.Wo * outputs + from;
#pragma unroll
        for (int i = 0; i < 4; i++)
          if ((unsigned)column[i] < (unsigned)columns) out[32 * i] = *reinterpret_cast<const T*>(row + column[i] * sizeof(T));
          else if (column[i] == -1 && first == 0) out[32 * i] = T(0.f);
      }
    }
  }
}

template <class T, bool LONG>
__global__ void __launch_bounds__(THREADS, CTAS<T, LONG>) forward_kernel(const __grid_constant__ ForwardTask<T> task) {
  extern __shared__ __align__(128) char shared[];
  const Windows& v = task.windows;
  const int tiles = v.tiles_y * v.tiles_x, tile = blockIdx.x / task.chunks % tiles, chunk = blockIdx.x % task.chunks;
  const int sample_window = blockIdx.x / task.chunks / tiles;
  const int64_t window = (int64_t)sample_window * tiles + tile;
  const int first_sample = task.per_sample ? sample_window : chunk << task.layout.log_batch;
  const int samples = min(task.layout.batch(), task.shape.B - first_sample);
  const int top = tile / v.tiles_x * v.step_h, left = tile % v.tiles_x * v.step_w;
  const int all = v.counts[window] * task.shape.F, blocks = max(1, (all + MOST_COLUMNS - 1) / MOST_COLUMNS);
  const int columns = max(32, ((all + blocks - 1) / blocks + 31) / 32 * 32);
  for (int block = blockIdx.y; block < blocks; block += gridDim.y) {
    const int first = block * columns, some = min(columns, all - first);
    auto run = [&](auto groups) {
      forward_columns<T, decltype(groups)::value, LONG>(task, shared, window, top, left, first_sample, samples, first, some);
    };
    switch (columns / 32) {
      case 1: run(std::integral_constant<int, 1>()); break;
      case 2: run(std::integral_constant<int, 2>()); break;
      case 3: run(std::integral_constant<int, 3>()); break;
      default: run(std::integral_constant<int, 4>());
    }
  }
}

template <class T>
int launch_forward(const void* x, const void* w, void* y, const Shape& s, const Windows& windows, const Tile& tile, int choices,
                   int processors, cudaStream_t stream) {
  ForwardTask<T> task{{static_cast<const T*>(x), s.Hi, s.Wi, s.C, s.wrap, is_aligned(x, s.C * sizeof(T))},
                      static_cast<const T*>(w), static_cast<T*>(y), s, windows, {}, (s.B + tile.batch - 1) / tile.batch,
                      choices > 1, is_aligned(w, s.C * sizeof(T)), divisor(s.F)};
  if (!lay_out(tile, s.ksize - 1, task.layout) || (choices > 1 && (choices != s.B || tile.batch != 1))) return UNSUPPORTED;
  if constexpr (std::is_same_v<T, float>)
    if (is_few(s)) return launch_few_forward(task.x.data, task.w, task.y, s, windows, choices, stream);
  int bytes = fit_stages(tile, s.ksize, MOST_SHARED, task.layout);
  if (bytes == 0) return UNSUPPORTED;
  const int staging = TABLES + TILE_ROWS * (MOST_COLUMNS * (int)sizeof(T) + 16);
  bytes = bytes > staging ? bytes : staging;
  if (choices > 1) task.chunks = 1;
  const int64_t tiles = (int64_t)choices * windows.tiles_y * windows.tiles_x * task.chunks;
  const int64_t columns = (int64_t)windows.cap * s.F, blocks = (columns + MOST_COLUMNS - 1) / MOST_COLUMNS;
  // Few tiles share out their columns, enough for each processor to have some.
  int64_t shares = 8 * (int64_t)processors / (tiles > 0 ? tiles : 1);
  shares = shares < 1 ? 1 : shares > blocks ? blocks : shares > 64 ? 64 : shares;
  if (tiles > INT32_MAX || !rows_fit(s)) return UNSUPPORTED;
  if (tiles == 0) return 0;
  const bool is_long = std::is_same_v<T, float> && s.C * s.ksize * s.ksize > LONG_SUM;
  auto kernel = is_long ? forward_kernel<T, std::is_same_v<T, float>> : forward_kernel<T, false>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3((unsigned)tiles, (unsigned)shares), THREADS, bytes, stream>>>(task);
  return cudaGetLastError();
}

}  // namespace smoe::portable

// y [B, Ho, Wo, K F] from x [B, Hi, Wi, C] and w [N F, taps, C], all of one type. `choices`: 1, or B where each sample has its
// own windows (then a tile has one sample). The windows are the tiles, of tile.rows x tile.columns pixels. A selection whose
// slot is 0xffff gives zero. `processors` of the device. UNSUPPORTED: a tile that is not 128 rows, columns or batch no power of
// two, more tiles or rows of weights than 2^31, or taps whose patch shared memory does not hold (from 9 x 9 on).
extern "C" int smoe_forward_portable(const void* x, const void* w, void* y, const smoe::Shape* shape,
                                     const smoe::Windows* windows, const smoe::Tile* tile, int choices, int type,
                                     int processors, cudaStream_t stream) {
  using namespace smoe;
  auto launch = [&](auto number) {
    return portable::launch_forward<decltype(number)>(x, w, y, *shape, *windows, *tile, choices, processors, stream);
  };
  return portable::of_type(type, launch);
}
