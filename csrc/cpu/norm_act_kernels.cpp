// The kernels of norm_act for one instruction set (see kernels.h).

#include "cpu/simd.h"  // first: declares exponential() of vectors, for common/norm_act.h

#include "cpu/kernels.h"
#include "cpu/norm_act.h"

// The compiler may take the condition for granted.
#define DMCP_ASSUME(condition) \
  if (!(condition)) __builtin_unreachable()

namespace dmcp {
namespace {

// --- Blocks of work
// -------------------------------------------------------------------------------

// Sums are taken per block and added in the order of the blocks, and what a block is depends on the
// shape alone: the result has the same bits for any number of threads.
constexpr int64_t kBlockElements = 32768;
constexpr int64_t kBlockRows = 32;  // at least: the sums of a block must be few next to its values
constexpr int64_t kAddends = 256;   // at most, to one sum in float; sums of sums are in double
constexpr int64_t kFewColumns = kBlockElements / kAddends;  // at least, where rows can be folded

thread_local Scratch scratch;

// --- Channels last: a matrix with a column per channel
// --------------------------------------------

// A dense matrix may be folded: several rows become one, so that the columns fill whole vectors.
template <typename T>
struct Matrix {
  using S = typename ComputeIn<T>::type;

  int64_t fold = 1;  // pixels in a row
  int64_t rows;      // whole rows
  int64_t columns;   // fold * channels
  int64_t left;      // columns of one more row that is not whole
  int64_t block_rows;
  int64_t blocks;

  // `widest`: the largest pitch among the tensors of the call.
  Matrix(const Shape& shape, int64_t widest) {
    if (widest == shape.channels) {
      int64_t unit = 1;
      while (unit * shape.channels % kLanes<S>) unit *= 2;  // lanes are a power of two
      fold = unit * larger(1, kFewColumns / (unit * shape.channels));
      if (fold > shape.count()) fold = 1;
    }
    columns = fold * shape.channels;
    rows = shape.count() / fold;
    left = shape.count() % fold * shape.channels;
    block_rows = smaller(kAddends, larger(kBlockRows, kBlockElements / columns));
    blocks = larger(1, blocks_of(rows, block_rows));
  }

  int64_t padded() const { return blocks_of(columns, kLanes<S>) * kLanes<S>; }
  int64_t pitch(int64_t own) const { return fold == 1 ? own : columns; }

  static constexpr int64_t kAtOnce = 4;  // rows that share the loads of per-channel values

  // body(Count<rows at once>, Whole or Part, first row, column)
  template <typename Body>
  void walk(int64_t block, const Body& body) const {
    const int64_t end = smaller(rows, (block + 1) * block_rows);
    int64_t row = block * block_rows;
    for (; row + kAtOnce <= end; row += kAtOnce) walk_row(Count<kAtOnce>{}, row, columns, body);
    for (; row < end; ++row) walk_row(Count<1>{}, row, columns, body);
    if (left && block == blocks - 1) walk_row(Count<1>{}, rows, left, body);
  }

 private:
  template <typename AtOnce, typename Body>
  static void walk_row(AtOnce at_once, int64_t row, int64_t end, const Body& body) {
    int64_t column = 0;
    for (; column + kLanes<S> <= end; column += kLanes<S>) body(at_once, Whole{}, row, column);
    if (column < end) body(at_once, Part{static_cast<int>(end - column)}, row, column);
  }
};

// An output of this size or more does not fit the caches that its readers look into: it is written
// past them, which spares reading what it overwrites. Over the large layers of MobileNetV2 forward
// and backward take a quarter less time so; at a megabyte they gain nothing.
constexpr int64_t kStreamedBytes = int64_t{4} << 20;

// An output as a matrix.
template <typename T>
struct Sink {
  T* data;
  int64_t pitch;
  bool streams;

  Sink(const Matrix<T>& matrix, Pitched<T> tensor)
      : data(tensor.data), pitch(matrix.pitch(tensor.pitch)) {
    constexpr int64_t kVectorBytes = kLanes<typename Matrix<T>::S> * sizeof(T);
    const int64_t row_bytes = pitch * sizeof(T);
    streams = kCanStream && row_bytes * matrix.rows >= kStreamedBytes &&
              row_bytes % kVectorBytes == 0 &&
              reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0;
  }

  template <typename V>
  void put(int64_t row, int64_t column, V v, Whole) const {
    T* to = data + row * pitch + column;
    if (streams)
      stream(to, v);
    else
      store(to, v);
  }
  template <typename V>
  void put(int64_t row, int64_t column, V v, Part part) const {
    store(data + row * pitch + column, v, part);
  }

  void end_block() const {
    if (streams) end_streams();
  }
};

// Asks for what will be read `kAtOnce` rows later. The hardware stops guessing where a row of a few
// kilobytes ends, and with several rows at once that is all the time. It may lie past the end.
template <typename T>
const T* reading(const T* from, int64_t pitch) {
  __builtin_prefetch(from + Matrix<T>::kAtOnce * pitch);
  return from;
}

// Repeats the values of the channels for every pixel of a folded row.
template <typename S>
void repeat(S* values, int64_t channels, int64_t columns) {
  for (int64_t c = channels; c < columns; ++c) values[c] = values[c - channels];
}

// total[k][c] += the sums [blocks][k][columns] of all blocks and folded pixels, in their order.
template <typename S>
void add_up(const S* sums, int64_t k, int64_t blocks, int64_t padded, int64_t columns,
            int64_t channels, double* total) {
  for (int64_t i = 0; i < k * channels; ++i) total[i] = 0.0;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < k; ++i)
      for (int64_t begin = 0; begin < columns; begin += channels)
        DMCP_INDEPENDENT
        for (int64_t c = 0; c < channels; ++c)
          total[i * channels + c] += sums[(block * k + i) * padded + begin + c];
}

// --- Channels first: a plane of pixels for every channel of every sample
// --------------------------

template <typename T>
struct Planes {
  using S = typename ComputeIn<T>::type;

  int64_t channels, pixels, planes, block_planes, blocks;

  explicit Planes(const Shape& shape)
      : channels(shape.channels),
        pixels(shape.pixels),
        planes(shape.batch * shape.channels),
        block_planes(larger(1, kBlockElements / shape.pixels)),
        blocks(blocks_of(planes, block_planes)) {}

  int64_t begin(int64_t plane, int64_t pitch) const {
    return plane / channels * pitch + plane % channels * pixels;
  }

  // body(plane, channel)
  template <typename Body>
  void walk(int64_t block, const Body& body) const {
    const int64_t end = smaller(planes, (block + 1) * block_planes);
    for (int64_t plane = block * block_planes; plane < end; ++plane) body(plane, plane % channels);
  }

  // body(Whole or Part, pixel)
  template <typename Body>
  void walk_plane(const Body& body) const {
    walk_pixels(0, pixels, body);
  }

  // The same, and end() after so many vectors that what they added up should be put away.
  template <typename Body, typename End>
  void walk_plane(const Body& body, const End& end) const {
    constexpr int64_t kSegment = kAddends * kLanes<S>;
    for (int64_t pixel = 0; pixel < pixels; pixel += kSegment) {
      walk_pixels(pixel, smaller(pixels, pixel + kSegment), body);
      end();
    }
  }

 private:
  template <typename Body>
  static void walk_pixels(int64_t pixel, int64_t end, const Body& body) {
    for (; pixel + kLanes<S> <= end; pixel += kLanes<S>) body(Whole{}, pixel);
    if (pixel < end) body(Part{static_cast<int>(end - pixel)}, pixel);
  }
};

// total[k][c] = the sums [planes][k] of all samples, in their order.
inline void add_up_planes(const double* sums, int64_t k, int64_t planes, int64_t channels,
                          double* total) {
  for (int64_t i = 0; i < k * channels; ++i) total[i] = 0.0;
  for (int64_t plane = 0; plane < planes; ++plane)
    for (int64_t i = 0; i < k; ++i) total[i * channels + plane % channels] += sums[plane * k + i];
}

// --- Per-channel values as arrays
// -----------------------------------------------------------------

// Loops over channels have no branches, so that they vectorise: a thousand divisions and square
// roots one by one take as long as the activations of a small layer.

inline bool complete(const Affine& affine) {
  return affine.weight && affine.bias && affine.scale;
}

thread_local Scratch constants;

// The same with arrays for what is absent.
template <typename S>
Affine completed(Affine affine, int64_t channels) {
  if (complete(affine)) return affine;
  S *ones = constants.take<S>(2 * channels), *zeros = ones + channels;
  for (int64_t c = 0; c < channels; ++c) {
    ones[c] = S(1);
    zeros[c] = S(0);
  }
  if (!affine.weight) affine.weight = ones;
  if (!affine.bias) affine.bias = zeros;
  if (!affine.scale) affine.scale = ones;
  return affine;
}

template <typename S>
struct Channels {
  static constexpr int64_t kArrays = 4;
  S *mean, *gain, *shift, *scale;

  Channels(S* memory, int64_t padded)
      : mean(memory),
        gain(memory + padded),
        shift(memory + 2 * padded),
        scale(memory + 3 * padded) {}

  void fill(const Affine& affine, int64_t channels, int64_t columns, bool fold_scale) const {
    DMCP_ASSUME(complete(affine));
    DMCP_INDEPENDENT
    for (int64_t c = 0; c < channels; ++c) {
      const Channel<S> channel = channel_of<S>(affine, c, fold_scale);
      mean[c] = channel.mean;
      gain[c] = channel.gain;
      shift[c] = channel.shift;
      scale[c] = channel.scale;
    }
    for (S* values : {mean, gain, shift, scale}) repeat(values, channels, columns);
  }
};

// --- Statistics
// -----------------------------------------------------------------------------------

template <typename S>
void write_moments(const Shape& shape, const S* origin, const double* total, void* mean, void* var,
                   void* running_mean, void* running_var, double momentum) {
  const double count = static_cast<double>(shape.count());
  S *means = static_cast<S*>(mean), *vars = static_cast<S*>(var);
  DMCP_INDEPENDENT
  for (int64_t c = 0; c < shape.channels; ++c) {
    const Moments<S> batch = moments_of<S>(origin[c], total[c], total[shape.channels + c], count);
    means[c] = batch.mean;
    vars[c] = batch.var;
  }
  if (!running_mean) return;
  DMCP_INDEPENDENT
  for (int64_t c = 0; c < shape.channels; ++c)
    update_running(static_cast<S*>(running_mean), static_cast<S*>(running_var), c,
                   Moments<S>{means[c], vars[c]}, count, momentum);
}

template <typename T, typename S>
void stats_channels_last(const Shape& shape, const T* x, int64_t own_pitch, double* total,
                         S* origin) {
  const Matrix<T> matrix(shape, own_pitch);
  const int64_t channels = shape.channels, padded = matrix.padded();
  const int64_t samples = smaller(kOriginSamples, shape.count());
  for (int64_t c = 0; c < channels; ++c) origin[c] = S(0);
  for (int64_t i = 0; i < samples; ++i) {
    const T* row = x + i * shape.count() / samples * own_pitch;
    int64_t c = 0;
    for (; c + kLanes<S> <= channels; c += kLanes<S>)
      store(origin + c, load(origin + c) + load(row + c));
    if (c < channels) {
      const int n = static_cast<int>(channels - c);
      store(origin + c, load(origin + c, n) + load(row + c, n), n);
    }
  }
  for (int64_t c = 0; c < channels; ++c) origin[c] /= static_cast<S>(samples);
  repeat(origin, channels, matrix.columns);

  S* sums = scratch.take<S>(matrix.blocks * 2 * padded);
  const int64_t pitch = matrix.pitch(own_pitch);
  for_blocks(matrix.blocks, shape.count() * channels, Direction::forwards, [=](int64_t block) {
    S *s1 = sums + block * 2 * padded, *s2 = s1 + padded;
    for (int64_t i = 0; i < 2 * padded; ++i) s1[i] = S(0);
    matrix.walk(block, [=](auto at_once, auto lanes, int64_t row, int64_t column) {
      const Vector<S> from = load(origin + column);
      Vector<S> a = load(s1 + column), b = load(s2 + column);
      for (int64_t r = 0; r < at_once.value; ++r) {
        const Vector<S> d = valid<S>(load(reading(x + (row + r) * pitch + column, pitch), lanes) - from, lanes);
        a += d;
        b += d * d;
      }
      store(s1 + column, a);
      store(s2 + column, b);
    });
  });
  add_up(sums, 2, matrix.blocks, padded, matrix.columns, channels, total);
}

template <typename T, typename S>
void stats_channels_first(const Shape& shape, const T* x, int64_t pitch, double* total, S* origin) {
  const Planes<T> planes(shape);
  const int64_t samples = smaller(kOriginSamples, shape.count());
  for (int64_t c = 0; c < shape.channels; ++c) {
    S sum = S(0);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t value = i * shape.count() / samples;
      sum += load(x + value / shape.pixels * pitch + c * shape.pixels + value % shape.pixels, 1)[0];
    }
    origin[c] = sum / static_cast<S>(samples);
  }
  double* sums = scratch.take<double>(planes.planes * 2);
  for_blocks(planes.blocks, planes.planes * shape.pixels, Direction::forwards, [=](int64_t block) {
    planes.walk(block, [=](int64_t plane, int64_t c) {
      const T* begin = x + planes.begin(plane, pitch);
      Vector<S> a = {}, b = {};
      double s1 = 0.0, s2 = 0.0;
      planes.walk_plane(
          [&](auto lanes, int64_t pixel) {
            const Vector<S> d = valid<S>(load(begin + pixel, lanes) - origin[c], lanes);
            a += d;
            b += d * d;
          },
          [&] {
            s1 += take_lanes<S>(a);
            s2 += take_lanes<S>(b);
          });
      sums[plane * 2] = s1;
      sums[plane * 2 + 1] = s2;
    });
  });
  add_up_planes(sums, 2, planes.planes, shape.channels, total);
}

// --- Forward
// --------------------------------------------------------------------------------------

template <Act act, Residual kind, typename T>
void forward_channels_last(const Shape& shape, const Affine& affine, Pitched<const T> x,
                           Pitched<const T> residual, Pitched<T> y) {
  using S = typename ComputeIn<T>::type;
  const Matrix<T> matrix(shape, larger(larger(x.pitch, y.pitch), residual.pitch));
  const int64_t padded = matrix.padded();
  const Channels<S> per_channel(scratch.take<S>(Channels<S>::kArrays * padded), padded);
  per_channel.fill(affine, shape.channels, matrix.columns,
                   homogeneous(act) || kind == Residual::before);
  const Sink<T> sink(matrix, y);
  const int64_t xp = matrix.pitch(x.pitch);
  const int64_t rp = matrix.pitch(residual.pitch);
  for_blocks(matrix.blocks, shape.count() * shape.channels, Direction::backwards,
             [=](int64_t block) {
               matrix.walk(block, [=](auto at_once, auto lanes, int64_t row, int64_t column) {
                 const Vector<S> mean = load(per_channel.mean + column);
                 const Vector<S> gain = load(per_channel.gain + column);
                 const Vector<S> shift = load(per_channel.shift + column);
                 const Vector<S> scale = load(per_channel.scale + column);
                 for (int64_t r = 0; r < at_once.value; ++r) {
                   Vector<S> added = {};
                   if constexpr (kind != Residual::none)
                     added = load(residual.data + (row + r) * rp + column, lanes);
                   sink.put(row + r, column,
                            norm_act<act, kind, S>(load(x.data + (row + r) * xp + column, lanes),
                                                   mean, gain, shift, scale, added),
                            lanes);
                 }
               });
               sink.end_block();
             });
}

template <Act act, Residual kind, typename T>
void forward_channels_first(const Shape& shape, const Affine& affine, Pitched<const T> x,
                            Pitched<const T> residual, Pitched<T> y) {
  using S = typename ComputeIn<T>::type;
  const Planes<T> planes(shape);
  const bool fold = homogeneous(act) || kind == Residual::before;
  for_blocks(planes.blocks, planes.planes * shape.pixels, Direction::backwards, [=](int64_t block) {
    planes.walk(block, [=](int64_t plane, int64_t c) {
      const Channel<S> channel = channel_of<S>(affine, c, fold);
      const Vector<S> mean = broadcast(channel.mean), gain = broadcast(channel.gain);
      const Vector<S> shift = broadcast(channel.shift), scale = broadcast(channel.scale);
      const T* from = x.data + planes.begin(plane, x.pitch);
      const T* other = residual.data + planes.begin(plane, residual.pitch);
      T* to = y.data + planes.begin(plane, y.pitch);
      planes.walk_plane([=](auto lanes, int64_t pixel) {
        Vector<S> added = {};
        if constexpr (kind != Residual::none) added = load(other + pixel, lanes);
        store(to + pixel,
              norm_act<act, kind, S>(load(from + pixel, lanes), mean, gain, shift, scale, added),
              lanes);
      });
    });
  });
}

// --- Backward: the sums
// ---------------------------------------------------------------------------

template <typename S>
void write_gradients(const Shape& shape, const Affine& affine, const double* total, bool fold,
                     S* sums) {
  const int64_t channels = shape.channels;
  DMCP_ASSUME(complete(affine));
  DMCP_INDEPENDENT
  for (int64_t c = 0; c < channels; ++c) {
    const Gradients<S> gradients =
        gradients_of<S>(affine, c, total[c], total[channels + c], total[2 * channels + c], fold);
    sums[c] = gradients.bias;
    sums[channels + c] = gradients.weight;
    sums[2 * channels + c] = gradients.scale;
  }
}

template <Act act, bool before, typename T>
void sums_channels_last(const Shape& shape, const Affine& affine, Pitched<const T> grad,
                        Pitched<const T> x, Pitched<const T> residual, Pitched<T> grad_residual,
                        double* total) {
  using S = typename ComputeIn<T>::type;
  const Matrix<T> matrix(
      shape, larger(larger(x.pitch, grad.pitch), larger(residual.pitch, grad_residual.pitch)));
  const int64_t padded = matrix.padded();
  S* memory = scratch.take<S>((Channels<S>::kArrays + matrix.blocks * 3) * padded);
  S* sums = memory + Channels<S>::kArrays * padded;
  const Channels<S> per_channel(memory, padded);
  per_channel.fill(affine, shape.channels, matrix.columns, before);
  const int64_t gp = matrix.pitch(grad.pitch), xp = matrix.pitch(x.pitch);
  const int64_t rp = matrix.pitch(residual.pitch), grp = matrix.pitch(grad_residual.pitch);
  for_blocks(matrix.blocks, shape.count() * shape.channels, Direction::forwards,
             [=](int64_t block) {
               S *s0 = sums + block * 3 * padded, *s1 = s0 + padded, *s2 = s1 + padded;
               for (int64_t i = 0; i < 3 * padded; ++i) s0[i] = S(0);
               matrix.walk(block, [=](auto at_once, auto lanes, int64_t row, int64_t column) {
                 const Vector<S> mean = load(per_channel.mean + column);
                 const Vector<S> gain = load(per_channel.gain + column);
                 const Vector<S> shift = load(per_channel.shift + column);
                 Vector<S> a = load(s0 + column), b = load(s1 + column), c = {};
                 if constexpr (!before && !homogeneous(act)) c = load(s2 + column);
                 for (int64_t r = 0; r < at_once.value; ++r) {
                   Vector<S> added = {};
                   if constexpr (before)
                     added = load(residual.data + (row + r) * rp + column, lanes);
                   const auto terms = terms_of<act, before, S>(
                       load(reading(grad.data + (row + r) * gp + column, gp), lanes),
                       load(reading(x.data + (row + r) * xp + column, xp), lanes), mean, gain, shift,
                       added);
                   a += valid<S>(terms.s0, lanes);
                   b += valid<S>(terms.s1, lanes);
                   if constexpr (!before && !homogeneous(act)) c += valid<S>(terms.s2, lanes);
                   if constexpr (before)
                     store(grad_residual.data + (row + r) * grp + column, terms.s0, lanes);
                 }
                 store(s0 + column, a);
                 store(s1 + column, b);
                 if constexpr (!before && !homogeneous(act)) store(s2 + column, c);
               });
             });
  add_up(sums, 3, matrix.blocks, padded, matrix.columns, shape.channels, total);
}

template <Act act, bool before, typename T>
void sums_channels_first(const Shape& shape, const Affine& affine, Pitched<const T> grad,
                         Pitched<const T> x, Pitched<const T> residual, Pitched<T> grad_residual,
                         double* total) {
  using S = typename ComputeIn<T>::type;
  const Planes<T> planes(shape);
  double* sums = scratch.take<double>(planes.planes * 3);
  for_blocks(planes.blocks, planes.planes * shape.pixels, Direction::forwards, [=](int64_t block) {
    planes.walk(block, [=](int64_t plane, int64_t c) {
      const Channel<S> channel = channel_of<S>(affine, c, before);
      const Vector<S> mean = broadcast(channel.mean), gain = broadcast(channel.gain);
      const Vector<S> shift = broadcast(channel.shift);
      const T* incoming = grad.data + planes.begin(plane, grad.pitch);
      const T* from = x.data + planes.begin(plane, x.pitch);
      const T* other = residual.data + planes.begin(plane, residual.pitch);
      T* to = grad_residual.data + planes.begin(plane, grad_residual.pitch);
      Vector<S> a = {}, b = {}, d = {};
      double s0 = 0.0, s1 = 0.0, s2 = 0.0;
      planes.walk_plane(
          [&](auto lanes, int64_t pixel) {
            Vector<S> added = {};
            if constexpr (before) added = load(other + pixel, lanes);
            const auto terms = terms_of<act, before, S>(
                load(incoming + pixel, lanes), load(from + pixel, lanes), mean, gain, shift, added);
            a += valid<S>(terms.s0, lanes);
            b += valid<S>(terms.s1, lanes);
            d += valid<S>(terms.s2, lanes);
            if constexpr (before) store(to + pixel, terms.s0, lanes);
          },
          [&] {
            s0 += take_lanes<S>(a);
            s1 += take_lanes<S>(b);
            s2 += take_lanes<S>(d);
          });
      sums[plane * 3] = s0;
      sums[plane * 3 + 1] = s1;
      sums[plane * 3 + 2] = s2;
    });
  });
  add_up_planes(sums, 3, planes.planes, shape.channels, total);
}

// --- Backward: the gradient of x
// ------------------------------------------------------------------

template <typename S>
struct GradChannels {
  static constexpr int64_t kArrays = 6;
  S *mean, *gain, *shift, *by_gradient, *constant, *by_input;

  GradChannels(S* memory, int64_t padded)
      : mean(memory),
        gain(memory + padded),
        shift(memory + 2 * padded),
        by_gradient(memory + 3 * padded),
        constant(memory + 4 * padded),
        by_input(memory + 5 * padded) {}

  void fill(const Affine& affine, const S* sums, double count, int64_t channels,
            int64_t columns) const {
    DMCP_ASSUME(complete(affine));
    DMCP_INDEPENDENT
    for (int64_t c = 0; c < channels; ++c) {
      const Channel<S> channel = channel_of<S>(affine, c, false);
      const InputGradient<S> input = input_gradient_of<S>(affine, sums, c, channels, count);
      mean[c] = channel.mean;
      gain[c] = channel.gain;
      shift[c] = channel.shift;
      by_gradient[c] = input.by_gradient;
      constant[c] = input.constant;
      by_input[c] = input.by_input;
    }
    for (S* values : {mean, gain, shift, by_gradient, constant, by_input})
      repeat(values, channels, columns);
  }
};

template <Act act, typename T>
void grad_channels_last(const Shape& shape, const Affine& affine, const void* sums, double count,
                        Pitched<const T> grad, Pitched<const T> x, Pitched<T> grad_x) {
  using S = typename ComputeIn<T>::type;
  const Matrix<T> matrix(shape, larger(larger(x.pitch, grad.pitch), grad_x.pitch));
  const int64_t padded = matrix.padded();
  const GradChannels<S> per_channel(scratch.take<S>(GradChannels<S>::kArrays * padded), padded);
  per_channel.fill(affine, static_cast<const S*>(sums), count, shape.channels, matrix.columns);
  const int64_t gp = matrix.pitch(grad.pitch), xp = matrix.pitch(x.pitch);
  const Sink<T> sink(matrix, grad_x);
  for_blocks(matrix.blocks, shape.count() * shape.channels, Direction::backwards,
             [=](int64_t block) {
               matrix.walk(block, [=](auto at_once, auto lanes, int64_t row, int64_t column) {
                 const Vector<S> mean = load(per_channel.mean + column);
                 const Vector<S> gain = load(per_channel.gain + column);
                 const Vector<S> shift = load(per_channel.shift + column);
                 const Vector<S> by_gradient = load(per_channel.by_gradient + column);
                 const Vector<S> constant = load(per_channel.constant + column);
                 const Vector<S> by_input = load(per_channel.by_input + column);
                 for (int64_t r = 0; r < at_once.value; ++r) {
                   sink.put(row + r, column,
                            grad_input<act, S>(load(grad.data + (row + r) * gp + column, lanes),
                                               load(x.data + (row + r) * xp + column, lanes), mean,
                                               gain, shift, by_gradient, constant, by_input),
                            lanes);
                 }
               });
               sink.end_block();
             });
}

template <Act act, typename T>
void grad_channels_first(const Shape& shape, const Affine& affine, const void* sums, double count,
                         Pitched<const T> grad, Pitched<const T> x, Pitched<T> grad_x) {
  using S = typename ComputeIn<T>::type;
  const Planes<T> planes(shape);
  for_blocks(planes.blocks, planes.planes * shape.pixels, Direction::backwards, [=](int64_t block) {
    planes.walk(block, [=](int64_t plane, int64_t c) {
      const Channel<S> channel = channel_of<S>(affine, c, false);
      const InputGradient<S> input =
          input_gradient_of<S>(affine, static_cast<const S*>(sums), c, shape.channels, count);
      const Vector<S> mean = broadcast(channel.mean), gain = broadcast(channel.gain);
      const Vector<S> shift = broadcast(channel.shift);
      const Vector<S> by_gradient = broadcast(input.by_gradient);
      const Vector<S> constant = broadcast(input.constant);
      const Vector<S> by_input = broadcast(input.by_input);
      const T* incoming = grad.data + planes.begin(plane, grad.pitch);
      const T* from = x.data + planes.begin(plane, x.pitch);
      T* to = grad_x.data + planes.begin(plane, grad_x.pitch);
      planes.walk_plane([=](auto lanes, int64_t pixel) {
        store(to + pixel,
              grad_input<act, S>(load(incoming + pixel, lanes), load(from + pixel, lanes), mean,
                                 gain, shift, by_gradient, constant, by_input),
              lanes);
      });
    });
  });
}

// --- From run time to compile time
// ----------------------------------------------------------------

template <Act act>
struct ActConstant {
  static constexpr Act value = act;
};

template <typename Call>
void with_act(Act act, const Call& call) {
  switch (act) {
    case Act::identity:
      return call(ActConstant<Act::identity>{});
    case Act::relu:
      return call(ActConstant<Act::relu>{});
    case Act::relu6:
      return call(ActConstant<Act::relu6>{});
    case Act::hardswish:
      return call(ActConstant<Act::hardswish>{});
    case Act::silu:
      return call(ActConstant<Act::silu>{});
  }
}

// --- The table
// ------------------------------------------------------------------------------------

// Per-channel results of a pass; apart from `scratch`, which the pass itself uses.
thread_local Scratch results;

void stats(const Shape& shape, Pitched<const void> x, void* mean, void* var, void* running_mean,
           void* running_var, double momentum) {
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = typename ComputeIn<T>::type;
    const int64_t channels = shape.channels;
    const int64_t columns = larger(Matrix<T>(shape, x.pitch).padded(), channels);
    double* total = results.take<double>(2 * channels + columns);
    S* origin = reinterpret_cast<S*>(total + 2 * channels);
    if (shape.channels_last)
      stats_channels_last(shape, of<T>(x).data, x.pitch, total, origin);
    else
      stats_channels_first(shape, of<T>(x).data, x.pitch, total, origin);
    write_moments(shape, origin, total, mean, var, running_mean, running_var, momentum);
  });
}

template <Residual kind, typename T>
void forward_of(const Shape& shape, const Affine& affine, Act act, Pitched<const T> x,
                Pitched<const T> residual, Pitched<T> y) {
  with_act(act, [&](auto constant) {
    constexpr Act kAct = decltype(constant)::value;
    if (shape.channels_last)
      forward_channels_last<kAct, kind>(shape, affine, x, residual, y);
    else
      forward_channels_first<kAct, kind>(shape, affine, x, residual, y);
  });
}

void forward(const Shape& shape, const Affine& given, Act act, Residual kind,
             Pitched<const void> x, Pitched<const void> residual, Pitched<void> y) {
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Affine affine = completed<typename ComputeIn<T>::type>(given, shape.channels);
    switch (kind) {
      case Residual::none:
        return forward_of<Residual::none>(shape, affine, act, of<T>(x), of<T>(residual), of<T>(y));
      case Residual::before:
        return forward_of<Residual::before>(shape, affine, act, of<T>(x), of<T>(residual),
                                            of<T>(y));
      case Residual::after:
        return forward_of<Residual::after>(shape, affine, act, of<T>(x), of<T>(residual), of<T>(y));
    }
  });
}

template <bool before, typename T>
void sums_of(const Shape& shape, const Affine& affine, Act act, Pitched<const T> grad,
             Pitched<const T> x, Pitched<const T> residual, Pitched<T> grad_residual, void* sums) {
  double* total = results.take<double>(3 * shape.channels);
  with_act(act, [&](auto constant) {
    constexpr Act kAct = decltype(constant)::value;
    if (shape.channels_last)
      sums_channels_last<kAct, before>(shape, affine, grad, x, residual, grad_residual, total);
    else
      sums_channels_first<kAct, before>(shape, affine, grad, x, residual, grad_residual, total);
  });
  using S = typename ComputeIn<T>::type;
  write_gradients(shape, affine, total, before || homogeneous(act), static_cast<S*>(sums));
}

void sums(const Shape& shape, const Affine& given, Act act, Pitched<const void> grad,
          Pitched<const void> x, Pitched<const void> residual, Pitched<void> grad_residual,
          void* sums) {
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Affine affine = completed<typename ComputeIn<T>::type>(given, shape.channels);
    if (residual.data)
      sums_of<true>(shape, affine, act, of<T>(grad), of<T>(x), of<T>(residual),
                    of<T>(grad_residual), sums);
    else
      sums_of<false>(shape, affine, act, of<T>(grad), of<T>(x), of<T>(residual),
                     of<T>(grad_residual), sums);
  });
}

void grad(const Shape& shape, const Affine& given, Act act, const void* sums, double count,
          Pitched<const void> grad, Pitched<const void> x, Pitched<void> grad_x) {
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Affine affine = completed<typename ComputeIn<T>::type>(given, shape.channels);
    with_act(act, [&](auto constant) {
      constexpr Act kAct = decltype(constant)::value;
      if (shape.channels_last)
        grad_channels_last<kAct>(shape, affine, sums, count, of<T>(grad), of<T>(x), of<T>(grad_x));
      else
        grad_channels_first<kAct>(shape, affine, sums, count, of<T>(grad), of<T>(x), of<T>(grad_x));
    });
  });
}

}  // namespace

namespace cpu {

extern const NormActKernels DMCP_KERNELS;
const NormActKernels DMCP_KERNELS = {stats, forward, sums, grad};

}  // namespace cpu
}  // namespace dmcp
