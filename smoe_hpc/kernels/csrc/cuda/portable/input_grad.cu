// dx = the gradient g of the outputs applied to the selected experts' filters, turned round, portably. A CTA makes a tile of
// 128 rows of the input grid x a block of up to 128 channels; the sum runs over the columns of the window's union of experts, a
// row of shared memory at a time, and the taps. Always in the same order.
#include "few.cuh"
#include "product.cuh"

namespace smoe::portable {

template <class T>
struct InputGradTask {
  Map<T> g;
  const T* w;
  T* dx;
  Shape shape;
  Windows windows;
  Layout layout;
  int chunks, channel_blocks;
  bool per_sample, aligned;
  Divisor filters;
};

template <class T, int GROUPS>
struct InputGradSource {
  static constexpr bool EXPANDS = true;
  static constexpr int SHARE = THREADS / DEPTH<T>;  // threads that load a row of the weights
  const InputGradTask<T>& task;
  char* tables;
  int64_t window;
  int top, left, first_sample, samples, first_channel, columns, patches;
  int row;        // of the weights that this thread loads, and the taps that it needs them for
  uint32_t mask;

  __device__ __forceinline__ int* rows() const { return reinterpret_cast<int*>(tables); }            // of the weights
  __device__ __forceinline__ uint32_t* masks() const { return reinterpret_cast<uint32_t*>(tables + 1024); }  // of 16 columns

  __device__ void prepare(int patch) {
    const Shape& s = task.shape;
    const Windows& v = task.windows;
    if (threadIdx.x < DEPTH<T>) {
      const int column = patch * DEPTH<T> + threadIdx.x, slot = task.filters.of(column);
      const bool there = column < columns;
      rows()[threadIdx.x] = there ? v.ids[window * v.cap + slot] * s.F + column - slot * s.F : -1;
      uint32_t needed = !there ? 0 : v.masks && s.ksize * s.ksize <= 16 ? v.masks[window * v.cap + slot] : ~0u;
#pragma unroll
      for (int other = 8; other > 0; other /= 2) needed |= __shfl_xor_sync(~0u, needed, other);
      if (threadIdx.x % 16 == 0) masks()[threadIdx.x / 16] = needed;
    }
    __syncthreads();
    row = rows()[threadIdx.x / SHARE], mask = masks()[threadIdx.x / SHARE / 16];
    if (s.ksize * s.ksize > 16) mask = mask ? ~0u : 0;
  }

  __device__ __forceinline__ void fill(char* to, char* raw, int patch, int first_row, int count) const {
    const Shape& s = task.shape;
    const Windows& v = task.windows;
    const Layout& l = task.layout;
    const int width = l.width(), pixels = (l.rows + count - 1) * width;
    clear_rows(to, pixels << l.log_batch);
    __syncthreads();
    auto locate = [&](int q, const uint16_t*& slots, int64_t& offset) {
      const int down = l.across.of(q), h = top + first_row + down, w = task.g.wrapped(left + q - down * width);
      slots = v.slots + (window * v.rows * v.columns + first_row * width + q) * s.K;
      offset = task.g.offset(first_sample, h, w);
      return task.g.has(h, w);
    };
    const Gradient<T> g{task.g.data, (int64_t)s.Ho * s.Wo * s.K * s.F, s.K, samples, task.filters, task.g.aligned};
    expand<true>(to, 0, raw, g, pixels, l.log_batch, patch * DEPTH<T>, DEPTH<T>, locate);
  }

  // The patch's pixel at shift (a, b) is read through tap (ksize - 1 - a, ksize - 1 - b).
  __device__ __forceinline__ int tap_of(int shift) const { return task.shape.ksize * task.shape.ksize - 1 - shift; }

  __device__ __forceinline__ void load(char* to, int, int shift) const {
    const Shape& s = task.shape;
    const int k = threadIdx.x / SHARE, tap = tap_of(shift);
    if (!(mask >> (tap % 32) & 1)) return;
    const int64_t offset = row < 0 ? 0 : ((int64_t)row * (s.ksize * s.ksize) + tap) * s.C;
#pragma unroll
    for (int i = 0; i < 32 * GROUPS / PIECE<T> / SHARE; i++) {
      const int piece = threadIdx.x % SHARE + i * SHARE, channel = first_channel + piece * PIECE<T>;
      const bool there = row >= 0 && channel < s.C;
      char* at = to + piece / 8 * (DEPTH<T> * ROW) + place(k, piece % 8);
      copy_piece(at, there ? task.w + offset + channel : task.w, there ? s.C - channel : 0, task.aligned);
    }
  }

  __device__ __forceinline__ uint32_t active(int, int shift) const {
    const int lane = lane_number(), tap = tap_of(shift);
    const uint32_t mask = lane < DEPTH<T> / 16 ? masks()[lane] : 0;
    return __ballot_sync(~0u, task.shape.ksize * task.shape.ksize <= 16 ? mask >> tap & 1 : mask != 0);
  }
};

template <class T, int GROUPS, bool LONG>
__device__ void input_grad_channels(const InputGradTask<T>& task, char* shared, int64_t window, int tile, int first_sample,
                                    int samples, int first_channel) {
  const Shape& s = task.shape;
  const Windows& v = task.windows;
  const Layout& layout = task.layout;
  const int top = tile / v.tiles_x * v.step_h, left = tile % v.tiles_x * v.step_w, columns = v.counts[window] * s.F;
  Product<T, true, GROUPS, LONG> product;
  product.start(layout);
  InputGradSource<T, GROUPS> source{task, shared, window, top + v.first, left + v.first, first_sample, samples, first_channel,
                                    columns, (columns + DEPTH<T> - 1) / DEPTH<T>, 0, 0};
  multiply(product, source, shared, layout, s.ksize);
  char* staging = shared + TABLES;
  const int pitch = 32 * GROUPS * (int)sizeof(T) + 16;
  product.write(staging, pitch);
  __syncthreads();

  constexpr int PIECES = 32 * GROUPS / PIECE<T>;
  for (int i = threadIdx.x; i < TILE_ROWS * PIECES; i += THREADS) {
    const int row = i / PIECES, channel = first_channel + i % PIECES * PIECE<T>;
    const int pixel = row >> layout.log_batch, sample = row & (layout.batch() - 1);
    const int h = top + pixel / layout.columns, w = left + pixel % layout.columns;
    if (h >= s.Hi || w >= s.Wi || sample >= samples || channel >= s.C) continue;
    const char* from = staging + row * pitch + i % PIECES * 16;
    T* to = task.dx + (((int64_t)(first_sample + sample) * s.Hi + h) * s.Wi + w) * s.C + channel;
    if (task.aligned) {
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    } else {
      for (int j = 0; j < PIECE<T> && channel + j < s.C; j++) to[j] = reinterpret_cast<const T*>(from)[j];
    }
  }
}

template <class T, bool LONG>
__global__ void __launch_bounds__(THREADS, CTAS<T, LONG>) input_grad_kernel(const __grid_constant__ InputGradTask<T> task) {
  extern __shared__ __align__(128) char shared[];
  const int tiles = task.windows.tiles_y * task.windows.tiles_x, tile = blockIdx.x / task.chunks % tiles;
  const int chunk = blockIdx.x % task.chunks, sample_window = blockIdx.x / task.chunks / tiles;
  const int64_t window = (int64_t)sample_window * tiles + tile;
  const int first_sample = task.per_sample ? sample_window : chunk << task.layout.log_batch;
  const int samples = min(task.layout.batch(), task.shape.B - first_sample);
  if (task.shape.C <= 64)
    input_grad_channels<T, 2, LONG>(task, shared, window, tile, first_sample, samples, 0);
  else
    input_grad_channels<T, 4, LONG>(task, shared, window, tile, first_sample, samples, blockIdx.y * 128);
}

template <class T>
int launch_input_grad(const void* g, const void* w, void* dx, const Shape& s, const Windows& windows, const Tile& tile,
                      int choices, cudaStream_t stream) {
  const bool g_aligned = is_aligned(g, (int64_t)s.K * s.F * sizeof(T));
  InputGradTask<T> task{{static_cast<const T*>(g), s.Ho, s.Wo, s.K * s.F, s.wrap, g_aligned}, static_cast<const T*>(w),
                        static_cast<T*>(dx), s, windows, {}, (s.B + tile.batch - 1) / tile.batch, 1, choices > 1,
                        is_aligned(w, s.C * sizeof(T)) && is_aligned(dx, s.C * sizeof(T)), divisor(s.F)};
  if (!lay_out(tile, s.ksize - 1, task.layout) || (choices > 1 && (choices != s.B || tile.batch != 1))) return UNSUPPORTED;
  if constexpr (std::is_same_v<T, float>)
    if (is_few(s)) return launch_few_input_grad(task.g.data, task.w, task.dx, s, windows, choices, stream);
  int bytes = fit_stages(tile, s.ksize, MOST_SHARED, task.layout);
  if (bytes == 0) return UNSUPPORTED;
  const int staging = TABLES + TILE_ROWS * (MOST_COLUMNS * (int)sizeof(T) + 16);
  bytes = bytes > staging ? bytes : staging;
  if (choices > 1) task.chunks = 1;
  task.channel_blocks = s.C <= 64 ? 1 : (s.C + 127) / 128;
  const int64_t tiles = (int64_t)choices * windows.tiles_y * windows.tiles_x * task.chunks;
  if (tiles > INT32_MAX || !rows_fit(s) || task.channel_blocks > 65535) return UNSUPPORTED;
  if (tiles == 0) return 0;
  const bool is_long = std::is_same_v<T, float> && (int64_t)s.K * s.F * s.ksize * s.ksize > LONG_SUM;
  auto kernel = is_long ? input_grad_kernel<T, std::is_same_v<T, float>> : input_grad_kernel<T, false>;
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  kernel<<<dim3((unsigned)tiles, (unsigned)task.channel_blocks), THREADS, bytes, stream>>>(task);
  return cudaGetLastError();
}

}  // namespace smoe::portable

// dx [B, Hi, Wi, C] from g [B, Ho, Wo, K F] and w [N F, taps, C], all of one type. The windows are tiles of the input grid with
// their halo. The rest as in smoe_forward_portable; the number of processors makes no difference here.
extern "C" int smoe_input_grad_portable(const void* g, const void* w, void* dx, const smoe::Shape* shape,
                                        const smoe::Windows* windows, const smoe::Tile* tile, int choices, int type,
                                        int /*processors*/, cudaStream_t stream) {
  using namespace smoe;
  auto launch = [&](auto number) {
    return portable::launch_input_grad<decltype(number)>(g, w, dx, *shape, *windows, *tile, choices, stream);
  };
  return portable::of_type(type, launch);
}
