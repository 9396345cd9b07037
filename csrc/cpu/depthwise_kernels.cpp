// The kernels of depthwise convolution for one instruction set (see kernels.h).
//
// A tile of a few hundred channels is computed at a time, over cells of a few neighbouring pixels:
// what is read of a cell's surroundings serves all of its pixels. Inside a cell the innermost loop
// goes along the channels, as memory does.

#include "cpu/kernels.h"

#include "cpu/depthwise.h"

// Before a loop over registers: no loop must be left of it.
#ifdef __clang__
#define DMCP_UNROLLED _Pragma("clang loop unroll(full)")
#else
#define DMCP_UNROLLED _Pragma("GCC unroll 32")
#endif

namespace dmcp {
namespace {

using cpu::Depthwise;

thread_local Scratch scratch;

// --- Parts of the work
// ------------------------------------------------------------------------------------

// Channels of a tile, at most: the weights of one stay in the cache nearest to the core.
constexpr int64_t kTileChannels = 256;

struct Tiles {
  int64_t channels, width, count;

  Tiles(int64_t channels, int64_t lanes) : channels(channels) {
    const int64_t fewest = larger(1, blocks_of(channels, kTileChannels));
    width = larger(1, blocks_of(blocks_of(channels, fewest), lanes)) * lanes;
    count = blocks_of(channels, width);
  }

  int64_t begin(int64_t tile) const { return tile * width; }
  int64_t size(int64_t tile) const { return smaller(width, channels - begin(tile)); }
};

// One bit for each of `count` neighbours from `begin`: whether it lies in [0, size).
inline uint32_t existing(int64_t begin, int count, int64_t size) {
  uint32_t bits = 0;
  for (int i = 0; i < count; ++i)
    bits |= static_cast<uint32_t>(begin + i >= 0 && begin + i < size) << i;
  return bits;
}

constexpr uint32_t all(int count) { return (uint32_t{1} << count) - 1; }

// A tensor's pixels, of one tile.
template <typename T>
struct Pixels {
  T* data;
  int64_t height, width;
  int64_t pitch;

  // The image's pixel, which need not exist, in that row and column.
  T* at(int64_t image, int64_t row, int64_t column) const {
    return data + ((image * height + row) * width + column) * pitch;
  }
  int64_t row_pitch() const { return width * pitch; }
};

// --- Convolution and gradient of the input
// ----------------------------------------------------------------

// Which of the kernel's taps takes an input to an output, along one axis. For the gradient of the
// input of a convolution, its roles are exchanged: `in` is the gradient of its output.
template <int k, int s, bool transposed>
struct Taps {
  static constexpr int kernel = k;
  static constexpr int taps = k * k;
  static constexpr int pad = k / 2;
  static constexpr int before = transposed ? pad / s : pad;

  // Inputs that so many neighbouring outputs read; the first one's position is a multiple of s
  // where that matters.
  static constexpr int inputs(int outputs) {
    return transposed ? before + (outputs - 1 + pad) / s + 1 : (outputs - 1) * s + k;
  }
  static constexpr int64_t origin(int64_t output) {
    return (transposed ? output / s : output * s) - before;
  }
  // None where it is not in [0, k).
  static constexpr int tap(int output, int input) {
    return transposed ? output + pad - s * (input - before) : input - s * output;
  }
  static constexpr bool connected(int output, int input) {
    return tap(output, input) >= 0 && tap(output, input) < k;
  }
};

constexpr int kCellRows = 2;

// What exists of a cell's surroundings and of the cell itself.
struct Extent {
  uint32_t in_rows, in_columns;
  int rows, columns;
};

// One vector of channels of a cell of outputs. `inside`: all of it exists.
template <typename Taps, int columns, bool inside, typename T, typename S, typename Lanes>
DMCP_HOST_DEVICE void convolve(const T* x, int64_t x_row, int64_t x_pitch, const S* weight,
                               int64_t weight_pitch, T* y, int64_t y_row, int64_t y_pitch,
                               Extent extent, bool streams, Lanes lanes) {
  constexpr int kInRows = Taps::inputs(kCellRows), kInColumns = Taps::inputs(columns);
  Vector<S> w[Taps::taps];
  DMCP_UNROLLED
  for (int tap = 0; tap < Taps::taps; ++tap) w[tap] = load(weight + tap * weight_pitch);
  Vector<S> sums[kCellRows][columns] = {};
  DMCP_UNROLLED
  for (int i = 0; i < kInRows; ++i) {
    if (!inside && !(extent.in_rows >> i & 1)) continue;
    DMCP_UNROLLED
    for (int j = 0; j < kInColumns; ++j) {
      if (!inside && !(extent.in_columns >> j & 1)) continue;
      const Vector<S> in = load(x + i * x_row + j * x_pitch, lanes);
      DMCP_UNROLLED
      for (int row = 0; row < kCellRows; ++row) {
        DMCP_UNROLLED
        for (int column = 0; column < columns; ++column) {
          if (Taps::connected(row, i) && Taps::connected(column, j))
            sums[row][column] += in * w[Taps::tap(row, i) * Taps::kernel + Taps::tap(column, j)];
        }
      }
    }
  }
  DMCP_UNROLLED
  for (int row = 0; row < kCellRows; ++row) {
    if (!inside && row >= extent.rows) continue;
    DMCP_UNROLLED
    for (int column = 0; column < columns; ++column) {
      if (!inside && column >= extent.columns) continue;
      T* to = y + row * y_row + column * y_pitch;
      if (inside && streams)
        stream(to, sums[row][column]);
      else
        store(to, sums[row][column], lanes);
    }
  }
}

// [channels, taps] as [taps, padded]; flipped: the last tap first.
template <typename S>
void transpose_weights(const S* weight, int taps, bool flipped, int64_t channels, int64_t padded,
                       S* to) {
  for (int tap = 0; tap < taps; ++tap, to += padded) {
    const S* from = weight + (flipped ? taps - 1 - tap : tap);
    for (int64_t c = 0; c < channels; ++c) to[c] = from[c * taps];
    for (int64_t c = channels; c < padded; ++c) to[c] = S(0);
  }
}

// Columns of a cell. What is rare has narrow cells only where code of wide ones is long: channels
// that do not fill a vector and the edges, for a large kernel.
constexpr int kWide = 4, kNarrow = 2;
constexpr bool wide_edges(int kernel) { return kernel == 3; }

// A row of cells of a tile.
template <typename Taps, typename T, typename S>
void convolve_row(const Pixels<const T>& x, const Pixels<T>& y, int64_t image, int64_t row,
                  int64_t channels, const S* weight, int64_t weight_pitch, bool streams) {
  const int64_t in_row = Taps::origin(row), x_row = x.row_pitch(), y_row = y.row_pitch();
  const int64_t left = channels % kLanes<S>, whole = channels - left;
  const uint32_t in_rows = existing(in_row, Taps::inputs(kCellRows), x.height);
  const int rows = static_cast<int>(smaller(kCellRows, y.height - row));
  const bool rows_inside = in_rows == all(Taps::inputs(kCellRows)) && rows == kCellRows;

  const auto edge = [&](auto width, auto lanes, int64_t column, int64_t begin, int64_t end) {
    constexpr int64_t kColumns = decltype(width)::value;
    const int64_t in_column = Taps::origin(column);
    const Extent extent = {in_rows, existing(in_column, Taps::inputs(kColumns), x.width), rows,
                           static_cast<int>(smaller(kColumns, y.width - column))};
    const T* from = x.at(image, in_row, in_column);
    T* to = y.at(image, row, column);
    for (int64_t c = begin; c < end; c += kLanes<S>)
      convolve<Taps, kColumns, false>(from + c, x_row, x.pitch, weight + c, weight_pitch, to + c,
                                      y_row, y.pitch, extent, false, lanes);
    return kColumns;
  };
  const auto edge_at = [&](auto lanes, int64_t column, int64_t begin, int64_t end) {
    if constexpr (wide_edges(Taps::kernel))
      if (y.width - column > kNarrow) return edge(Count<kWide>{}, lanes, column, begin, end);
    return edge(Count<kNarrow>{}, lanes, column, begin, end);
  };

  for (int64_t column = 0; column < y.width;) {
    const int64_t in_column = Taps::origin(column);
    if (rows_inside && in_column >= 0 && column + kWide <= y.width &&
        in_column + Taps::inputs(kWide) <= x.width) {
      const T* from = x.at(image, in_row, in_column);
      T* to = y.at(image, row, column);
      for (int64_t c = 0; c < whole; c += kLanes<S>)
        convolve<Taps, kWide, true>(from + c, x_row, x.pitch, weight + c, weight_pitch, to + c,
                                    y_row, y.pitch, {}, streams, Whole{});
      column += kWide;
    } else {
      column += edge_at(Whole{}, column, 0, whole);
    }
  }
  if (left == 0) return;
  for (int64_t column = 0; column < y.width;)
    column += edge_at(Part{static_cast<int>(left)}, column, whole, channels);
}

// Outputs of a block, about: enough to be worth the weights of its tile.
constexpr int64_t kBlockOutputs = 65536;

// An output of this size or more does not fit the caches that its readers look into.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

template <typename Taps, typename T, typename S>
void convolve_all(int64_t batch, int64_t channels, Pixels<const T> x, const S* weight,
                  bool flipped, Pixels<T> y) {
  const Tiles tiles(channels, kLanes<S>);
  const int64_t cell_rows = blocks_of(y.height, kCellRows), rows = batch * cell_rows;
  const int64_t row_outputs = kCellRows * y.width * tiles.width;
  const int64_t spans = larger(1, blocks_of(rows * row_outputs, kBlockOutputs));
  const int64_t outputs = batch * y.height * y.width * channels;
  constexpr int64_t kVectorBytes = kLanes<S> * sizeof(T);
  const bool streams = kCanStream && outputs * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes &&
                       y.pitch * sizeof(T) % kVectorBytes == 0 &&
                       reinterpret_cast<uintptr_t>(y.data) % kVectorBytes == 0;
  for_blocks(tiles.count * spans, outputs, Direction::forwards, [=](int64_t block) {
    const int64_t tile = block / spans, span = block % spans, begin = tiles.begin(tile);
    S* transposed = scratch.take<S>(Taps::taps * tiles.width);
    transpose_weights(weight + begin * Taps::taps, Taps::taps, flipped, tiles.size(tile),
                      tiles.width, transposed);
    const Pixels<const T> in = {x.data + begin, x.height, x.width, x.pitch};
    const Pixels<T> out = {y.data + begin, y.height, y.width, y.pitch};
    const int64_t end = rows * (span + 1) / spans;
    for (int64_t row = rows * span / spans; row < end; ++row)
      convolve_row<Taps>(in, out, row / cell_rows, row % cell_rows * kCellRows, tiles.size(tile),
                         transposed, tiles.width, streams);
    if (streams) end_streams();
  });
}

// --- Gradient of the weight
// -------------------------------------------------------------------------------

// Adds what one vector of channels of a few neighbouring outputs brings to sums [k * k].
template <int k, int s, int columns, bool inside, typename T, typename S, typename Lanes>
DMCP_HOST_DEVICE void correlate(const T* x, int64_t x_row, int64_t x_pitch, const T* grad,
                                int64_t grad_pitch, S* sums, int64_t sums_pitch, uint32_t in_rows,
                                uint32_t in_columns, Lanes lanes) {
  constexpr int kTaps = k * k, kInColumns = (columns - 1) * s + k;
  Vector<S> sum[kTaps], g[columns];
  DMCP_UNROLLED
  for (int tap = 0; tap < kTaps; ++tap) sum[tap] = load(sums + tap * sums_pitch);
  DMCP_UNROLLED
  for (int column = 0; column < columns; ++column)
    g[column] = load(grad + column * grad_pitch, lanes);
  DMCP_UNROLLED
  for (int i = 0; i < k; ++i) {
    if (!inside && !(in_rows >> i & 1)) continue;
    DMCP_UNROLLED
    for (int j = 0; j < kInColumns; ++j) {
      if (!inside && !(in_columns >> j & 1)) continue;
      const Vector<S> in = load(x + i * x_row + j * x_pitch, lanes);
      DMCP_UNROLLED
      for (int column = 0; column < columns; ++column) {
        const int tap = j - column * s;
        if (tap >= 0 && tap < k) sum[i * k + tap] += in * g[column];
      }
    }
  }
  DMCP_UNROLLED
  for (int tap = 0; tap < kTaps; ++tap) store(sums + tap * sums_pitch, sum[tap]);
}

// Adds what one row of outputs brings.
template <int k, int s, typename T, typename S>
void correlate_row(const Pixels<const T>& x, const Pixels<const T>& grad, int64_t image,
                   int64_t row, int64_t channels, S* sums, int64_t sums_pitch) {
  const int64_t in_row = row * s - k / 2, x_row = x.row_pitch();
  const int64_t left = channels % kLanes<S>, whole = channels - left;
  const uint32_t in_rows = existing(in_row, k, x.height);

  const auto edge = [&](auto width, auto lanes, int64_t column, int64_t begin, int64_t end) {
    constexpr int64_t kColumns = decltype(width)::value;
    const int64_t in_column = column * s - k / 2;
    const uint32_t in_columns = existing(in_column, (kColumns - 1) * s + k, x.width);
    const T *from = x.at(image, in_row, in_column), *g = grad.at(image, row, column);
    for (int64_t c = begin; c < end; c += kLanes<S>)
      correlate<k, s, kColumns, false>(from + c, x_row, x.pitch, g + c, grad.pitch, sums + c,
                                       sums_pitch, in_rows, in_columns, lanes);
    return kColumns;
  };
  const auto edge_at = [&](auto lanes, int64_t column, int64_t begin, int64_t end) {
    if constexpr (wide_edges(k))
      if (grad.width - column >= kWide) return edge(Count<kWide>{}, lanes, column, begin, end);
    if (grad.width - column >= kNarrow) return edge(Count<kNarrow>{}, lanes, column, begin, end);
    return edge(Count<1>{}, lanes, column, begin, end);
  };

  for (int64_t column = 0; column < grad.width;) {
    const int64_t in_column = column * s - k / 2;
    if (in_rows == all(k) && in_column >= 0 && column + kWide <= grad.width &&
        in_column + (kWide - 1) * s + k <= x.width) {
      const T *from = x.at(image, in_row, in_column), *g = grad.at(image, row, column);
      for (int64_t c = 0; c < whole; c += kLanes<S>)
        correlate<k, s, kWide, true>(from + c, x_row, x.pitch, g + c, grad.pitch, sums + c,
                                     sums_pitch, 0, 0, Whole{});
      column += kWide;
    } else {
      column += edge_at(Whole{}, column, 0, whole);
    }
  }
  if (left == 0) return;
  for (int64_t column = 0; column < grad.width;)
    column += edge_at(Part{static_cast<int>(left)}, column, whole, channels);
}

// Sums are taken per block of rows and added in the order of the blocks, and what a block is
// depends on the shape alone: the result has the same bits for any number of threads.
constexpr int64_t kAddends = 256;   // about, to one sum in float; sums of sums are in double
constexpr int64_t kFewAddends = 32;  // where there would not be
constexpr int64_t kBlocks = 8;       // of them

template <int k, int s, typename T, typename S>
void correlate_all(int64_t batch, int64_t channels, Pixels<const T> grad, Pixels<const T> x,
                   S* grad_weight) {
  constexpr int kTaps = k * k;
  const Tiles tiles(channels, kLanes<S>);
  const int64_t rows = batch * grad.height;
  int64_t addends = kAddends;
  while (addends > kFewAddends && rows * grad.width / addends * tiles.count < kBlocks) addends /= 2;
  const int64_t block_rows = larger(1, addends / grad.width), blocks = blocks_of(rows, block_rows);
  const int64_t padded = tiles.count * tiles.width;
  double* total = scratch.take<double>(channels + blocks * kTaps * padded);
  S* sums = reinterpret_cast<S*>(total + channels);
  const int64_t outputs = rows * grad.width * channels;
  for_blocks(blocks * tiles.count, outputs, Direction::forwards, [=](int64_t work) {
    const int64_t block = work / tiles.count, tile = work % tiles.count;
    const int64_t begin = tiles.begin(tile);
    S* to = sums + block * kTaps * padded + begin;
    for (int tap = 0; tap < kTaps; ++tap)
      for (int64_t c = 0; c < tiles.width; ++c) to[tap * padded + c] = S(0);
    const Pixels<const T> in = {x.data + begin, x.height, x.width, x.pitch};
    const Pixels<const T> g = {grad.data + begin, grad.height, grad.width, grad.pitch};
    const int64_t end = smaller(rows, (block + 1) * block_rows);
    for (int64_t row = block * block_rows; row < end; ++row)
      correlate_row<k, s>(in, g, row / g.height, row % g.height, tiles.size(tile), to, padded);
  });
  for (int tap = 0; tap < kTaps; ++tap) {
    for (int64_t c = 0; c < channels; ++c) total[c] = 0.0;
    for (int64_t block = 0; block < blocks; ++block) {
      const S* from = sums + (block * kTaps + tap) * padded;
      DMCP_INDEPENDENT
      for (int64_t c = 0; c < channels; ++c) total[c] += from[c];
    }
    for (int64_t c = 0; c < channels; ++c) grad_weight[c * kTaps + tap] = static_cast<S>(total[c]);
  }
}

// --- From run time to compile time, and the table
// -----------------------------------------------------------------

// call(Type of activations, Count<kernel>, Count<stride>)
template <typename Call>
void with_types(const Depthwise& conv, const Call& call) {
  with_dtype(conv.dtype, [&](auto type) {
    const auto with_stride = [&](auto kernel) {
      if (conv.stride == 1) return call(type, kernel, Count<1>{});
      return call(type, kernel, Count<2>{});
    };
    if (conv.kernel == 3) return with_stride(Count<3>{});
    return with_stride(Count<5>{});
  });
}

template <typename T, typename Data>
Pixels<T> outer(const Depthwise& conv, Pitched<Data> tensor) {
  return {static_cast<T*>(tensor.data), conv.height, conv.width, tensor.pitch};
}
template <typename T, typename Data>
Pixels<T> inner(const Depthwise& conv, Pitched<Data> tensor) {
  return {static_cast<T*>(tensor.data), conv.out_height(), conv.out_width(), tensor.pitch};
}

void forward(const Depthwise& conv, Pitched<const void> x, const void* weight, Pitched<void> y) {
  with_types(conv, [&](auto type, auto kernel, auto stride) {
    using T = typename decltype(type)::type;
    using S = typename ComputeIn<T>::type;
    convolve_all<Taps<kernel.value, stride.value, false>, T, S>(
        conv.batch, conv.channels, outer<const T>(conv, x), static_cast<const S*>(weight),
        false, inner<T>(conv, y));
  });
}

void grad_input(const Depthwise& conv, Pitched<const void> grad, const void* weight,
                Pitched<void> grad_x) {
  with_types(conv, [&](auto type, auto kernel, auto stride) {
    using T = typename decltype(type)::type;
    using S = typename ComputeIn<T>::type;
    // Of stride 1, it is a convolution with the kernel turned round.
    constexpr bool kFlipped = stride.value == 1;
    convolve_all<Taps<kernel.value, stride.value, !kFlipped>, T, S>(
        conv.batch, conv.channels, inner<const T>(conv, grad), static_cast<const S*>(weight),
        kFlipped, outer<T>(conv, grad_x));
  });
}

void grad_weight(const Depthwise& conv, Pitched<const void> grad, Pitched<const void> x,
                 void* grad_weight) {
  with_types(conv, [&](auto type, auto kernel, auto stride) {
    using T = typename decltype(type)::type;
    using S = typename ComputeIn<T>::type;
    correlate_all<kernel.value, stride.value, T, S>(conv.batch, conv.channels,
                                                    inner<const T>(conv, grad),
                                                    outer<const T>(conv, x),
                                                    static_cast<S*>(grad_weight));
  });
}

}  // namespace

namespace cpu {

extern const DepthwiseKernels DMCP_KERNELS;
const DepthwiseKernels DMCP_KERNELS = {forward, grad_input, grad_weight};

}  // namespace cpu
}  // namespace dmcp
