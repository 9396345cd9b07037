#include "cuda/norm_act.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/launch.h"

namespace dmcp::cuda {
namespace {

// A call is cut into jobs of about the same size, as many as the device runs at a time. Within a
// job a thread keeps to its channels, loads 16 bytes at a time and several times ahead, and adds up
// in registers; the threads of a block meet at the end of the job, the jobs in a kernel of their
// own. All jobs walk over memory together, from its beginning to its end. Forward and backward read
// the activations twice; the second pass goes backwards: what the first one read last is still in
// the cache.
constexpr int kThreads = 256;  // of a block, at most
constexpr int kAhead = 4;      // vectors of each tensor that a thread loads before it uses them

// Blocks that a multiprocessor runs at a time, by what their registers allow.
constexpr int kStatsBlocks = 3, kSumsBlocks = 2, kGradBlocks = 2;
constexpr int forward_blocks(Residual kind) { return kind == Residual::none ? 3 : 2; }

// --- Numbers -------------------------------------------------------------------------------------

// What activations are computed in.
template <typename T>
struct ComputeIn {
  using type = float;
};
template <>
struct ComputeIn<double> {
  using type = double;
};
template <typename T>
using Real = typename ComputeIn<T>::type;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

__device__ void narrow(float value, float* to) { *to = value; }
__device__ void narrow(double value, double* to) { *to = value; }
__device__ void narrow(float value, __nv_bfloat16* to) { *to = __float2bfloat16_rn(value); }
__device__ void narrow(float value, __half* to) { *to = __float2half_rn(value); }

__device__ float widen(float value) { return value; }
__device__ double widen(double value) { return value; }
__device__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ float widen(__half value) { return __half2float(value); }

template <int width, typename T>
__device__ void widen(const T (&lanes)[width], Real<T> (&values)[width]) {
#pragma unroll
  for (int i = 0; i < width; ++i) values[i] = widen(lanes[i]);
}

// A bfloat16 is the upper half of a float: one instruction a value, where those of the header are
// two for every other one.
template <int width>
__device__ void widen(const __nv_bfloat16 (&lanes)[width], float (&values)[width]) {
  uint32_t words[width / 2];
  memcpy(words, lanes, sizeof words);
#pragma unroll
  for (int i = 0; i < width; ++i)
    values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
}
__device__ void widen(const __nv_bfloat16 (&lanes)[1], float (&values)[1]) {
  values[0] = widen(lanes[0]);
}

// Neighbours that are read at once: 16 bytes, or a single one where addresses allow no more. They
// stay packed until they are used: 16 bytes are four registers, but eight numbers are eight.
template <typename T, int width>
struct Vector {
  using Bits = std::conditional_t<width == 1, T, uint4>;
  Bits bits;

  __device__ void unpack(Real<T> (&values)[width]) const {
    T lanes[width];
    memcpy(lanes, &bits, sizeof lanes);
    widen(lanes, values);
  }
};

// A tensor, and what all places of a thread in it have in common.
template <typename T>
struct Region {
  T* data;
  int64_t pitch, begin;

  __device__ T* at(uint32_t outer, int64_t inner) const {
    return data + (begin + outer * pitch + inner);
  }
};

// Where a vector lies: at outer * pitch + inner of every region. Lanes outside of [low, high)
// belong to others: they may be read, for an aligned vector never leaves an allocation that holds
// one of its lanes, but must not be written or added up.
struct Spot {
  uint32_t outer;
  int64_t inner;
  int low, high;

  template <int width>
  __device__ bool whole() const {
    return low == 0 && high == width;
  }
  __device__ bool holds(int lane) const { return low <= lane && lane < high; }
};

template <int width, typename T>
__device__ Vector<T, width> load(const Region<const T>& region, const Spot& spot) {
  const T* from = region.at(spot.outer, spot.inner);
  return {__ldg(reinterpret_cast<const typename Vector<T, width>::Bits*>(from))};
}

template <int width, typename T>
__device__ void store(const Region<T>& region, const Spot& spot, const Real<T> (&values)[width]) {
  using Bits = typename Vector<T, width>::Bits;
  T* to = region.at(spot.outer, spot.inner);
  T lanes[width];
#pragma unroll
  for (int i = 0; i < width; ++i) narrow(values[i], &lanes[i]);
  if (spot.whole<width>()) {
    Bits bits;
    memcpy(&bits, lanes, sizeof bits);
    __stwb(reinterpret_cast<Bits*>(to), bits);
    return;
  }
#pragma unroll
  for (int i = 0; i < width; ++i)
    if (spot.holds(i)) to[i] = lanes[i];
}

// The values of a vector, and `otherwise` for lanes that are not ours.
template <int width, typename T, int own>
__device__ void unpack(const Vector<T, width>& vector, const Spot& spot,
                       const Real<T> (&otherwise)[own], Real<T> (&values)[width]) {
  vector.unpack(values);
  if (spot.whole<width>()) return;
#pragma unroll
  for (int i = 0; i < width; ++i)
    if (!spot.holds(i)) values[i] = otherwise[i % own];
}

// --- Who works where -----------------------------------------------------------------------------
//
// A layout says so. Of every job it tells: the number of its `slots`, one per channel; the column
// of the sums and the channel that belong to a slot; the first of the `kOwn` slots that are a
// thread's own; which `lane` of how many a thread is among those with the same slots; where its
// regions begin; and, by `walk`, the vectors that are a thread's own.

__device__ int thread_of_block() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
__device__ int threads_of_block() { return blockDim.x * blockDim.y * blockDim.z; }

// The compiler saves registers by computing values again, even in the innermost loop. Not these.
__device__ void keep(int& value) { asm volatile("" : "+r"(value)); }
__device__ void keep(int64_t& value) { asm volatile("" : "+l"(value)); }

// Items that threads take in turns, `at_once` of them at a time.
struct Turns {
  int first, step, count;  // those of one thread

  __device__ Turns(int turn, int at_once, int items, bool backwards)
      : first(backwards ? items - 1 - turn : turn),
        step(backwards ? -at_once : at_once),
        count((items - turn + at_once - 1) / at_once) {
    keep(first);
    keep(step);
    keep(count);
  }
  __device__ int item(int i) const { return first + i * step; }
};

// Loads several vectors before the first is used: that is what hides the memory's latency. `at` is
// asked twice for the same spot, to keep it out of registers in between.
template <int ahead, typename At, typename Load, typename Use>
__device__ void unrolled(int count, const At& at, const Load& load, const Use& use) {
  for (int first = 0; first < count; first += ahead) {
    decltype(load(Spot{})) loaded[ahead];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= count) continue;
      const Spot spot = at(first + i);
      if (spot.low < spot.high) loaded[i] = load(spot);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= count) continue;
      const Spot spot = at(first + i);
      if (spot.low < spot.high) use(spot, loaded[i]);
    }
  }
}

// Channels last: a matrix with a column per channel. A job is a tile of columns and every
// `splits`th group of rows. blockDim = (vectors of a tile, rows at a time). A dense matrix may be
// folded: several rows become one, so that they begin at multiples of 16 bytes; a last row may be
// shorter.
template <int width>
struct Rows {
  static constexpr int kWidth = width;
  static constexpr int kOwn = width;
  static constexpr int kTile = 64;  // vectors at most
  static constexpr int kSlots = kTile * width;

  int rows;     // whole ones
  int columns;  // a multiple of the channels
  int left;     // columns of the short row
  int channels, tiles, splits;

  __device__ int jobs() const { return tiles * splits; }
  __device__ int split(int job) const { return job / tiles; }
  __device__ int slots() const { return blockDim.x * width; }
  __device__ int own_slot() const { return threadIdx.x * width; }
  __device__ int lane() const { return threadIdx.y; }
  __device__ int lanes() const { return blockDim.y; }
  __device__ int column(int job, int slot) const { return job % tiles * slots() + slot; }
  __device__ int channel(int job, int slot) const { return column(job, slot) % channels; }
  __device__ int64_t begin(int job) const { return column(job, own_slot()); }

  template <int ahead, typename Load, typename Use>
  __device__ void walk(int job, bool backwards, const Load& load, const Use& use) const {
    const int inner = column(job, own_slot());
    int whole = min(columns - inner, width), rest = min(left - inner, width);
    keep(whole);
    keep(rest);
    const Turns turns(split(job) * lanes() + lane(), splits * lanes(), rows + (left > 0),
                      backwards);
    unrolled<ahead>(
        whole > 0 ? turns.count : 0,
        [&](int i) {
          const int row = turns.item(i);
          return Spot{static_cast<uint32_t>(row), 0, 0, row < rows ? whole : rest};
        },
        load, use);
  }
};

// n / divisor for n < 2^31 without a division: (n multiplier / 2^32 + n) / 2^shift.
struct Divider {
  uint32_t divisor, multiplier;
  int shift;

  explicit Divider(uint32_t d) : divisor(d), shift(0) {
    while (uint64_t{1} << shift < d) ++shift;
    multiplier =
        static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - d)) / d + 1);
  }

  __device__ uint32_t quotient(uint32_t n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

// Channels first: a plane of pixels for every channel of every sample, cut into chunks where it is
// more than a block reads at a time. A job is a few channels and every `splits`th group of samples,
// or of chunks. blockDim = (vectors of a chunk, samples at a time, channels). Vectors are aligned
// whatever the planes are: the first and the last of a plane may hold lanes of its neighbours.
template <int width>
struct Planes {
  static constexpr int kWidth = width;
  static constexpr int kOwn = 1;
  static constexpr int kSlots = 64;  // the most that blockDim.z can be

  int64_t pixels;
  int items;       // chunks of one channel
  Divider chunks;  // of a plane
  int pitch;       // modulo the width, where all tensors agree
  int channels, groups, splits;

  __device__ int jobs() const { return groups * splits; }
  __device__ int split(int job) const { return job / groups; }
  __device__ int slots() const { return blockDim.z; }
  __device__ int own_slot() const { return threadIdx.z; }
  __device__ int lane() const { return threadIdx.x + blockDim.x * threadIdx.y; }
  __device__ int lanes() const { return blockDim.x * blockDim.y; }
  __device__ int column(int job, int slot) const { return job % groups * slots() + slot; }
  __device__ int channel(int job, int slot) const { return min(column(job, slot), channels - 1); }
  __device__ int64_t begin(int job) const { return column(job, own_slot()) * pixels; }

  template <int ahead, typename Load, typename Use>
  __device__ void walk(int job, bool backwards, const Load& load, const Use& use) const {
    int plane = static_cast<int>(begin(job) % width);
    keep(plane);
    const Turns turns(split(job) * blockDim.y + threadIdx.y, splits * blockDim.y, items, backwards);
    unrolled<ahead>(
        column(job, own_slot()) < channels ? turns.count : 0,
        [&](int i) {
          const uint32_t item = turns.item(i), sample = chunks.quotient(item);
          const uint32_t vector = (item - sample * chunks.divisor) * blockDim.x + threadIdx.x;
          const int before = (plane + sample * pitch) % width;  // lanes of the plane before
          const int64_t pixel = int64_t{vector} * width - before;
          return Spot{sample, pixel, vector == 0 ? before : 0,
                      static_cast<int>(min(int64_t{width}, pixels - pixel))};
        },
        load, use);
  }
};

template <typename T, typename Layout>
__device__ Region<T> region_of(Pitched<T> tensor, int job, const Layout& layout) {
  Region<T> region = {tensor.data, tensor.pitch, layout.begin(job)};
  keep(region.begin);
  return region;
}

// --- Sums ----------------------------------------------------------------------------------------

// sums += terms, over the lanes too where they are of one channel.
template <int count, int own, int width, typename S>
__device__ void accumulate(S (&sums)[count][own], const S (&terms)[count][width]) {
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if constexpr (own == width) {
#pragma unroll
      for (int i = 0; i < width; ++i) sums[k][i] += terms[k][i];
    } else {
      S total = terms[k][0];
#pragma unroll
      for (int i = 1; i < width; ++i) total += terms[k][i];
      sums[k][0] += total;
    }
  }
}

// Numbers that `add_lanes` wants in shared memory.
template <int count, int own, int threads = kThreads>
constexpr int kExchanged = count * own * threads / 2;

// The sums of all lanes go to lane 0, pairwise.
template <int count, int own, typename S, typename Layout>
__device__ void add_lanes(S (&sums)[count][own], S* shared, const Layout& layout) {
  const int lane = layout.lane(), lanes = layout.lanes();
  int half = 1;
  while (2 * half < lanes) half *= 2;
#pragma unroll 1
  for (int active = lanes; active > 1; active = half, half /= 2) {
    S* mine = shared + (lane % half * layout.slots() + layout.own_slot()) * count;
    if (lane >= half && lane < active)
      for (int k = 0; k < count; ++k)
        for (int i = 0; i < own; ++i) mine[k * own + i] = sums[k][i];
    __syncthreads();
    if (lane + half < active)
      for (int k = 0; k < count; ++k)
        for (int i = 0; i < own; ++i) sums[k][i] += mine[k * own + i];
    __syncthreads();
  }
}

// Sums of the jobs [splits, count, columns]; a channel has `fold` columns, `channels` apart.
template <typename S>
struct Partials {
  S* data;
  int columns, channels, fold, splits;
};

template <int count, int own, typename S, typename Layout>
__device__ void write(const S (&sums)[count][own], int job, const Partials<S>& partials,
                      const Layout& layout) {
  if (layout.lane() != 0) return;
  const int column = layout.column(job, layout.own_slot());
  S* to = partials.data + int64_t{layout.split(job)} * count * partials.columns + column;
#pragma unroll
  for (int k = 0; k < count; ++k)
#pragma unroll
    for (int i = 0; i < own; ++i)
      if (column + i < partials.columns) to[int64_t{k} * partials.columns + i] = sums[k][i];
}

// The threads of a finishing block: blockDim = (channels, lanes).
struct Finish {
  static constexpr int kThreads = 512;

  __device__ int slots() const { return blockDim.x; }
  __device__ int own_slot() const { return threadIdx.x; }
  __device__ int lane() const { return threadIdx.y; }
  __device__ int lanes() const { return blockDim.y; }
  __device__ int channel() const { return blockIdx.x * blockDim.x + threadIdx.x; }
};

// The sums of a thread's channel; true where they are complete, in one thread of each channel.
template <int count, typename S>
__device__ bool add_partials(const Partials<S>& partials, double (&totals)[count]) {
  __shared__ double shared[kExchanged<count, 1, Finish::kThreads>];
  const Finish layout;
  const int c = layout.channel();
  double sums[count][1] = {};
  if (c < partials.channels) {
#pragma unroll 4
    for (int i = layout.lane(); i < partials.splits * partials.fold; i += layout.lanes()) {
      const int64_t row = int64_t{i / partials.fold} * count;
      const S* from = partials.data + i % partials.fold * partials.channels + c;
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k][0] += from[(row + k) * partials.columns];
    }
  }
  add_lanes(sums, shared, layout);
  for (int k = 0; k < count; ++k) totals[k] = sums[k][0];
  return layout.lane() == 0 && c < partials.channels;
}

// --- Activations ---------------------------------------------------------------------------------

// Known to the compiler, or, where speed matters less than the size of the code, to the device.
template <Act act>
struct Fixed {
  static constexpr Act value = act;

  template <typename Call>
  __device__ void with(const Call& call) const {
    call(*this);
  }
};

struct Chosen {
  Act act;

#pragma nv_exec_check_disable  // `call` is for the host or for the device, as the caller is
  template <typename Call>
  __host__ __device__ void with(const Call& call) const {
    switch (act) {
      case Act::identity:
        return call(Fixed<Act::identity>{});
      case Act::relu:
        return call(Fixed<Act::relu>{});
      case Act::relu6:
        return call(Fixed<Act::relu6>{});
      case Act::hardswish:
        return call(Fixed<Act::hardswish>{});
      case Act::silu:
        return call(Fixed<Act::silu>{});
    }
  }
};

// --- Per-channel values --------------------------------------------------------------------------

// Computed once per job, by the threads together, and then copied to registers.
template <int count, typename S, typename Layout, typename Make>
__device__ void per_channel(const Layout& layout, int job, S* shared,
                            S (&values)[count][Layout::kOwn], const Make& make) {
  const int slots = layout.slots();
#pragma unroll 1
  for (int slot = thread_of_block(); slot < slots; slot += threads_of_block()) {
    S made[count];
    make(layout.channel(job, slot), made);
#pragma unroll
    for (int k = 0; k < count; ++k) shared[k * slots + slot] = made[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < count; ++k)
#pragma unroll
    for (int i = 0; i < Layout::kOwn; ++i) values[k][i] = shared[k * slots + layout.own_slot() + i];
  __syncthreads();
}

template <typename Layout, int values, int sums = 0>
constexpr int kShared = std::max(values * Layout::kSlots, kExchanged<sums, Layout::kOwn>);

// --- Statistics ----------------------------------------------------------------------------------

// Where the values lie whose mean is the origin of a channel.
template <typename T>
struct Samples {
  const T* x;
  int64_t channel_pitch;
  int count;
  int64_t at[kOriginSamples];
};

template <typename T>
__device__ Real<T> origin_of(const Samples<T>& samples, int c) {
  const T* x = samples.x + c * samples.channel_pitch;
  double sum = 0.0;
#pragma unroll
  for (int i = 0; i < kOriginSamples; ++i)
    if (i < samples.count) sum += widen(x[samples.at[i]]);
  return static_cast<Real<T>>(sum / samples.count);
}

template <typename T, typename Layout>
__global__ void __launch_bounds__(kThreads, kStatsBlocks)
    stats_kernel(Layout layout, Pitched<const T> x, Samples<T> samples, Partials<Real<T>> partials,
                 Real<T>* origins) {
  using S = Real<T>;
  constexpr int kWidth = Layout::kWidth, kOwn = Layout::kOwn;
  __shared__ S shared[kShared<Layout, 1, 2>];
  for (int job = blockIdx.x; job < layout.jobs(); job += gridDim.x) {
    S origin[1][kOwn], sums[2][kOwn] = {};
    per_channel(layout, job, shared, origin,
                [&](int c, S(&made)[1]) { made[0] = origin_of(samples, c); });
    const Region<const T> from = region_of(x, job, layout);
    layout.template walk<kAhead>(
        job, false, [&](const Spot& spot) { return load<kWidth>(from, spot); },
        [&](const Spot& spot, const Vector<T, kWidth>& vector) {
          S values[kWidth], terms[2][kWidth];
          unpack(vector, spot, origin[0], values);
#pragma unroll
          for (int i = 0; i < kWidth; ++i) {
            const S d = values[i] - origin[0][i % kOwn];
            terms[0][i] = d;
            terms[1][i] = d * d;
          }
          accumulate(sums, terms);
        });
    add_lanes(sums, shared, layout);
    write(sums, job, partials, layout);
    if (layout.split(job) == 0 && layout.lane() == 0)
      for (int i = 0; i < kOwn; ++i) {
        const int c = layout.column(job, layout.own_slot() + i);
        if (c < partials.channels) origins[c] = origin[0][i];
      }
  }
}

template <typename S>
__global__ void __launch_bounds__(Finish::kThreads)
    finish_stats_kernel(Partials<S> partials, const S* origins, double count, S* mean, S* var,
                        S* running_mean, S* running_var, double momentum) {
  double totals[2];
  if (!add_partials(partials, totals)) return;
  const int c = Finish{}.channel();
  const Moments<S> batch = moments_of<S>(origins[c], totals[0], totals[1], count);
  mean[c] = batch.mean;
  var[c] = batch.var;
  if (running_mean) update_running(running_mean, running_var, c, batch, count, momentum);
}

// --- Forward -------------------------------------------------------------------------------------

template <Residual kind, typename T, typename Layout, typename Activation>
__global__ void __launch_bounds__(kThreads, forward_blocks(kind))
    forward_kernel(Layout layout, Affine affine, Activation activation, bool fold,
                   Pitched<const T> x, Pitched<const T> residual, Pitched<T> y) {
  using S = Real<T>;
  constexpr int kWidth = Layout::kWidth, kOwn = Layout::kOwn;
  struct Loaded {
    Vector<T, kWidth> x, residual;
  };
  __shared__ S shared[kShared<Layout, 4>];
  for (int job = layout.jobs() - 1 - blockIdx.x; job >= 0; job -= gridDim.x) {
    S own[4][kOwn];
    per_channel(layout, job, shared, own, [&](int c, S(&made)[4]) {
      const Channel<S> channel = channel_of<S>(affine, c, fold);
      made[0] = channel.mean;
      made[1] = channel.gain;
      made[2] = channel.shift;
      made[3] = channel.scale;
    });
    const Region<const T> from = region_of(x, job, layout);
    const Region<const T> added = region_of(residual, job, layout);
    const Region<T> to = region_of(y, job, layout);
    layout.template walk<kAhead>(
        job, true,
        [&](const Spot& spot) {
          Loaded loaded;
          loaded.x = load<kWidth>(from, spot);
          if constexpr (kind != Residual::none) loaded.residual = load<kWidth>(added, spot);
          return loaded;
        },
        [&](const Spot& spot, const Loaded& loaded) {
          S values[kWidth], residuals[kWidth] = {};
          loaded.x.unpack(values);
          if constexpr (kind != Residual::none) loaded.residual.unpack(residuals);
          activation.with([&](auto act) {
            constexpr Act kAct = decltype(act)::value;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              const S scale = homogeneous(kAct) ? S(1) : own[3][i % kOwn];
              values[i] =
                  dmcp::norm_act<kAct, kind, S>(values[i], own[0][i % kOwn], own[1][i % kOwn],
                                                own[2][i % kOwn], scale, residuals[i]);
            }
          });
          store(to, spot, values);
        });
  }
}

// --- Backward ------------------------------------------------------------------------------------

// With a residual, which then comes before the activation, also its gradient.
template <bool before, typename T, typename Layout, typename Activation>
__global__ void __launch_bounds__(kThreads, kSumsBlocks)
    sums_kernel(Layout layout, Affine affine, Activation activation, Pitched<const T> grad,
                Pitched<const T> x, Pitched<const T> residual, Pitched<T> grad_residual,
                Partials<Real<T>> partials) {
  using S = Real<T>;
  constexpr int kWidth = Layout::kWidth, kOwn = Layout::kOwn, kSums = before ? 2 : 3;
  struct Loaded {
    Vector<T, kWidth> grad, x, residual;
  };
  __shared__ S shared[kShared<Layout, 3, kSums>];
  for (int job = blockIdx.x; job < layout.jobs(); job += gridDim.x) {
    S own[3][kOwn], sums[kSums][kOwn] = {};
    per_channel(layout, job, shared, own, [&](int c, S(&made)[3]) {
      const Channel<S> channel = channel_of<S>(affine, c, before);
      made[0] = channel.mean;
      made[1] = channel.gain;
      made[2] = channel.shift;
    });
    const Region<const T> incoming = region_of(grad, job, layout);
    const Region<const T> from = region_of(x, job, layout);
    const Region<const T> added = region_of(residual, job, layout);
    const Region<T> to = region_of(grad_residual, job, layout);
    layout.template walk<before ? 3 : kAhead>(
        job, false,
        [&](const Spot& spot) {
          Loaded loaded;
          loaded.grad = load<kWidth>(incoming, spot);
          loaded.x = load<kWidth>(from, spot);
          if constexpr (before) loaded.residual = load<kWidth>(added, spot);
          return loaded;
        },
        [&](const Spot& spot, const Loaded& loaded) {
          constexpr S kZero[1] = {};
          S grads[kWidth], values[kWidth], residuals[kWidth] = {}, terms[kSums][kWidth];
          unpack(loaded.grad, spot, kZero, grads);
          unpack(loaded.x, spot, own[0], values);
          if constexpr (before) unpack(loaded.residual, spot, kZero, residuals);
          activation.with([&](auto act) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              const Terms<S> term = terms_of<decltype(act)::value, before, S>(
                  grads[i], values[i], own[0][i % kOwn], own[1][i % kOwn], own[2][i % kOwn],
                  residuals[i]);
              terms[0][i] = term.s0;
              terms[1][i] = term.s1;
              if constexpr (!before) terms[2][i] = term.s2;
            }
          });
          accumulate(sums, terms);
          if constexpr (before) store(to, spot, terms[0]);
        });
    add_lanes(sums, shared, layout);
    write(sums, job, partials, layout);
  }
}

template <int count, typename S>
__global__ void __launch_bounds__(Finish::kThreads)
    finish_sums_kernel(Partials<S> partials, Affine affine, bool fold, S* sums) {
  double totals[count];
  if (!add_partials(partials, totals)) return;
  const int c = Finish{}.channel();
  const Gradients<S> gradients =
      gradients_of<S>(affine, c, totals[0], totals[1], count == 3 ? totals[count - 1] : 0.0, fold);
  sums[c] = gradients.bias;
  sums[partials.channels + c] = gradients.weight;
  sums[2 * partials.channels + c] = gradients.scale;
}

template <typename T, typename Layout, typename Activation>
__global__ void __launch_bounds__(kThreads, kGradBlocks)
    grad_kernel(Layout layout, Affine affine, Activation activation, const Real<T>* sums,
                double count, int channels, Pitched<const T> grad, Pitched<const T> x,
                Pitched<T> grad_x) {
  using S = Real<T>;
  constexpr int kWidth = Layout::kWidth, kOwn = Layout::kOwn;
  struct Loaded {
    Vector<T, kWidth> grad, x;
  };
  __shared__ S shared[kShared<Layout, 6>];
  for (int job = layout.jobs() - 1 - blockIdx.x; job >= 0; job -= gridDim.x) {
    S own[6][kOwn];
    per_channel(layout, job, shared, own, [&](int c, S(&made)[6]) {
      const Channel<S> channel = channel_of<S>(affine, c, false);
      const InputGradient<S> input = input_gradient_of<S>(affine, sums, c, channels, count);
      made[0] = channel.mean;
      made[1] = channel.gain;
      made[2] = channel.shift;
      made[3] = input.by_gradient;
      made[4] = input.constant;
      made[5] = input.by_input;
    });
    const Region<const T> incoming = region_of(grad, job, layout);
    const Region<const T> from = region_of(x, job, layout);
    const Region<T> to = region_of(grad_x, job, layout);
    layout.template walk<kAhead>(
        job, true,
        [&](const Spot& spot) {
          return Loaded{load<kWidth>(incoming, spot), load<kWidth>(from, spot)};
        },
        [&](const Spot& spot, const Loaded& loaded) {
          S grads[kWidth], values[kWidth];
          loaded.grad.unpack(grads);
          loaded.x.unpack(values);
          activation.with([&](auto act) {
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
              values[i] = grad_input<decltype(act)::value, S>(
                  grads[i], values[i], own[0][i % kOwn], own[1][i % kOwn], own[2][i % kOwn],
                  own[3][i % kOwn], own[4][i % kOwn], own[5][i % kOwn]);
          });
          store(to, spot, values);
        });
  }
}

// --- Plans ---------------------------------------------------------------------------------------

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int64_t within(int64_t low, int64_t value, int64_t high) {
  return std::max(low, std::min(value, high));
}

template <typename Layout>
struct Plan {
  Layout layout;
  dim3 grid, block;
  int columns, fold;  // of the sums, and columns per channel
};

// With one pixel per sample the two layouts are the same, and so they are with none.
bool by_rows(const Shape& shape) { return shape.channels_last || shape.pixels <= 1; }

// Dense rows that together are whole vectors.
template <int width>
int folds(const Shape& shape) {
  return static_cast<int>(width / std::gcd(shape.channels, int64_t{width}));
}

int narrowed(int64_t size, const char* what) {
  constexpr int kSlack = 1 << 24;  // more than the threads of a grid
  if (size > std::numeric_limits<int>::max() - kSlack)
    throw std::invalid_argument(std::string("norm_act on CUDA takes fewer ") + what + " than " +
                                std::to_string(size));
  return static_cast<int>(size);
}

// `blocks`: how many there should be.
template <int width>
Plan<Rows<width>> plan_rows(const Shape& shape, int fold, int64_t blocks) {
  const int64_t columns = fold * shape.channels, left = shape.count() % fold * shape.channels;
  const int64_t rows = shape.count() / fold, all = rows + (left > 0);
  const int64_t vectors = ceil_div(columns, width);
  int64_t tile = vectors;
  if (vectors > Rows<width>::kTile)  // tiles begin at multiples of four vectors: what DRAM fetches
    tile = ceil_div(ceil_div(vectors, ceil_div(vectors, Rows<width>::kTile)), 4) * 4;
  const int64_t tiles = ceil_div(vectors, tile), lanes = within(1, all, kThreads / tile);
  const int64_t splits = within(1, ceil_div(all, lanes * kAhead), blocks / tiles);
  const Rows<width> layout = {narrowed(rows, "pixels"), narrowed(columns, "channels"),
                              static_cast<int>(left),   static_cast<int>(shape.channels),
                              static_cast<int>(tiles),  static_cast<int>(splits)};
  return {layout, dim3(static_cast<unsigned>(tiles * splits)),
          dim3(static_cast<unsigned>(tile), static_cast<unsigned>(lanes)), layout.columns, fold};
}

template <int width>
Plan<Planes<width>> plan_planes(const Shape& shape, int64_t pitch, int64_t blocks) {
  // Planes begin at multiples of `step` modulo the width, so that up to width - step lanes of the
  // first vector may be of others.
  const int64_t step = std::gcd(std::gcd(shape.pixels, pitch), int64_t{width});
  const int64_t vectors = ceil_div(shape.pixels + width - step, width);
  const int64_t chunks = ceil_div(vectors, kThreads), x = ceil_div(vectors, chunks);
  const int64_t items = shape.batch * chunks;
  const int64_t y = chunks > 1 ? 1 : within(1, ceil_div(items, kAhead), kThreads / x);
  const int64_t z = within(1, shape.channels, std::min(kThreads / (x * y), int64_t{64}));
  const int64_t groups = ceil_div(shape.channels, z);
  const int64_t splits = within(1, ceil_div(items, y * kAhead), blocks / groups);
  const Planes<width> layout = {shape.pixels,
                                narrowed(items, "samples"),
                                Divider(static_cast<uint32_t>(chunks)),
                                static_cast<int>(pitch % width),
                                narrowed(shape.channels, "channels"),
                                static_cast<int>(groups),
                                static_cast<int>(splits)};
  return {layout, dim3(static_cast<unsigned>(std::min(groups * splits, blocks))),
          dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z)),
          layout.channels, 1};
}

// The plan for a call on these tensors, in vectors where their addresses allow it.
template <typename T, typename Call>
void with_plan(const char* kernel, int blocks_per_multiprocessor, const Shape& shape,
               std::initializer_list<Pitched<const void>> tensors, const Call& call) {
  constexpr int kWidth = kVector<T>;
  const int64_t blocks = int64_t{blocks_per_multiprocessor} * multiprocessors(kernel);
  const int64_t pitch = tensors.begin()->pitch;
  bool aligned = true, dense = true, whole = true, alike = true;
  for (const Pitched<const void>& tensor : tensors) {
    if (!tensor.data) continue;
    aligned &= reinterpret_cast<uintptr_t>(tensor.data) % 16 == 0;
    dense &= tensor.pitch == shape.channels;
    whole &= tensor.pitch % kWidth == 0;
    alike &= (tensor.pitch - pitch) % kWidth == 0;
  }
  if (!by_rows(shape)) {
    if (aligned && alike) return call(plan_planes<kWidth>(shape, pitch, blocks));
    return call(plan_planes<1>(shape, pitch, blocks));
  }
  if (aligned && whole) return call(plan_rows<kWidth>(shape, 1, blocks));
  if (aligned && dense) return call(plan_rows<kWidth>(shape, folds<kWidth>(shape), blocks));
  return call(plan_rows<1>(shape, 1, blocks));
}

template <typename Layout, typename T>
Pitched<T> placed(const Plan<Layout>& plan, Pitched<T> tensor) {
  return {tensor.data, plan.fold > 1 ? plan.columns : tensor.pitch};
}

template <typename S, typename Layout>
Partials<S> partials_of(const Plan<Layout>& plan, void* workspace) {
  return {static_cast<S*>(workspace), plan.columns, plan.layout.channels, plan.fold,
          plan.layout.splits};
}

template <typename Layout>
int64_t partial_sums(const Plan<Layout>& plan, int count) {
  return int64_t{plan.layout.splits} * count * plan.columns;
}

// --- From run time to compile time ---------------------------------------------------------------

template <typename T>
struct Type {
  using type = T;
};

template <typename Call>
void with_dtype(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::float32:
      return call(Type<float>{});
    case DType::bfloat16:
      return call(Type<__nv_bfloat16>{});
    case DType::float16:
      return call(Type<__half>{});
    case DType::float64:
      return call(Type<double>{});
  }
}

template <typename T, int width, typename Call>
void with_activation(Act act, const Call& call) {
  const Chosen chosen = {act};
  if constexpr (width == 1 || std::is_same_v<T, double>)
    call(chosen);
  else
    chosen.with(call);
}

template <typename T>
Pitched<const T> of(Pitched<const void> tensor) {
  return {static_cast<const T*>(tensor.data), tensor.pitch};
}
template <typename T>
Pitched<T> of(Pitched<void> tensor) {
  return {static_cast<T*>(tensor.data), tensor.pitch};
}

Pitched<const void> constant(Pitched<void> tensor) { return {tensor.data, tensor.pitch}; }

template <typename T>
Samples<T> samples_of(const Shape& shape, Pitched<const T> x) {
  const int64_t count = shape.count(), pixels = shape.channels_last ? 1 : shape.pixels;
  Samples<T> samples = {
      x.data, pixels, static_cast<int>(std::min(count, int64_t{kOriginSamples})), {}};
  for (int i = 0; i < samples.count; ++i) {
    const int64_t value = i * count / samples.count;
    samples.at[i] = value / pixels * x.pitch + value % pixels;
  }
  return samples;
}

// A finishing block takes few channels, so that there are many blocks, but reads 32 bytes in a row.
unsigned finish_channels(const Shape& shape) {
  return static_cast<unsigned>(within(1, shape.channels / 16, 8));
}
dim3 finish_grid(const Shape& shape) {
  return dim3(static_cast<unsigned>(ceil_div(shape.channels, finish_channels(shape))));
}
dim3 finish_block(const Shape& shape) {
  return dim3(finish_channels(shape), Finish::kThreads / finish_channels(shape));
}

}  // namespace

int64_t norm_workspace(const Shape& shape) {
  const int64_t blocks = multiprocessors("norm_workspace");
  int64_t bytes = 0;
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = kVector<T>;
    int64_t sums = 0;
    const auto consider = [&](auto plan_of) {
      sums = std::max({sums, partial_sums(plan_of(kStatsBlocks * blocks), 2),
                       partial_sums(plan_of(kSumsBlocks * blocks), 3)});
    };
    if (by_rows(shape)) {
      consider([&](int64_t n) { return plan_rows<kWidth>(shape, 1, n); });
      consider([&](int64_t n) { return plan_rows<kWidth>(shape, folds<kWidth>(shape), n); });
      consider([&](int64_t n) { return plan_rows<1>(shape, 1, n); });
    } else {
      for (int pitch = 1; pitch <= kWidth; pitch *= 2)
        consider([&](int64_t n) { return plan_planes<kWidth>(shape, pitch, n); });
      consider([&](int64_t n) { return plan_planes<1>(shape, 1, n); });
    }
    bytes = (sums + shape.channels) * static_cast<int64_t>(sizeof(Real<T>));
  });
  return bytes;
}

void norm_stats(const Shape& shape, Pitched<const void> x, void* mean, void* var,
                void* running_mean, void* running_var, double momentum, void* workspace,
                cudaStream_t stream) {
  if (shape.channels == 0) return;
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = Real<T>;
    with_plan<T>("norm_stats", kStatsBlocks, shape, {x}, [&](const auto& plan) {
      using Layout = decltype(plan.layout);
      const Partials<S> partials = partials_of<S>(plan, workspace);
      S* origins = partials.data + partial_sums(plan, 2);
      launch("norm_stats", stats_kernel<T, Layout>, plan.grid, plan.block, stream, plan.layout,
             placed(plan, of<T>(x)), samples_of(shape, of<T>(x)), partials, origins);
      launch("norm_stats (finish)", finish_stats_kernel<S>, finish_grid(shape), finish_block(shape),
             stream, partials, origins, static_cast<double>(shape.count()), static_cast<S*>(mean),
             static_cast<S*>(var), static_cast<S*>(running_mean), static_cast<S*>(running_var),
             momentum);
    });
  });
}

void norm_act(const Shape& shape, const Affine& affine, Act act, Residual kind,
              Pitched<const void> x, Pitched<const void> residual, Pitched<void> y,
              cudaStream_t stream) {
  if (shape.channels == 0 || shape.count() == 0) return;
  const bool fold = homogeneous(act) || kind == Residual::before;
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto tensors = {x, residual, constant(y)};
    with_plan<T>("norm_act", forward_blocks(kind), shape, tensors, [&](const auto& plan) {
      using Layout = decltype(plan.layout);
      with_activation<T, Layout::kWidth>(act, [&](auto activation) {
        using Activation = decltype(activation);
        const auto queue = [&](auto kernel) {
          launch("norm_act", kernel, plan.grid, plan.block, stream, plan.layout, affine, activation,
                 fold, placed(plan, of<T>(x)), placed(plan, of<T>(residual)),
                 placed(plan, of<T>(y)));
        };
        switch (kind) {
          case Residual::none:
            return queue(forward_kernel<Residual::none, T, Layout, Activation>);
          case Residual::before:
            return queue(forward_kernel<Residual::before, T, Layout, Activation>);
          case Residual::after:
            return queue(forward_kernel<Residual::after, T, Layout, Activation>);
        }
      });
    });
  });
}

template <bool before>
void norm_act_sums_of(const Shape& shape, const Affine& affine, Act act, Pitched<const void> grad,
                      Pitched<const void> x, Pitched<const void> residual,
                      Pitched<void> grad_residual, void* sums, void* workspace,
                      cudaStream_t stream) {
  constexpr int kSums = before ? 2 : 3;
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = Real<T>;
    const auto tensors = {grad, x, residual, constant(grad_residual)};
    with_plan<T>("norm_act_sums", kSumsBlocks, shape, tensors, [&](const auto& plan) {
      using Layout = decltype(plan.layout);
      const Partials<S> partials = partials_of<S>(plan, workspace);
      with_activation<T, Layout::kWidth>(act, [&](auto activation) {
        launch("norm_act_sums", sums_kernel<before, T, Layout, decltype(activation)>, plan.grid,
               plan.block, stream, plan.layout, affine, activation, placed(plan, of<T>(grad)),
               placed(plan, of<T>(x)), placed(plan, of<T>(residual)),
               placed(plan, of<T>(grad_residual)), partials);
      });
      launch("norm_act_sums (finish)", finish_sums_kernel<kSums, S>, finish_grid(shape),
             finish_block(shape), stream, partials, affine, before || homogeneous(act),
             static_cast<S*>(sums));
    });
  });
}

void norm_act_sums(const Shape& shape, const Affine& affine, Act act, Pitched<const void> grad,
                   Pitched<const void> x, Pitched<const void> residual, Pitched<void> grad_residual,
                   void* sums, void* workspace, cudaStream_t stream) {
  if (shape.channels == 0) return;
  if (residual.data)
    norm_act_sums_of<true>(shape, affine, act, grad, x, residual, grad_residual, sums, workspace,
                           stream);
  else
    norm_act_sums_of<false>(shape, affine, act, grad, x, residual, grad_residual, sums, workspace,
                            stream);
}

void norm_act_grad(const Shape& shape, const Affine& affine, Act act, const void* sums,
                   double count, Pitched<const void> grad, Pitched<const void> x,
                   Pitched<void> grad_x, cudaStream_t stream) {
  if (shape.channels == 0 || shape.count() == 0) return;
  with_dtype(shape.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const auto tensors = {grad, x, constant(grad_x)};
    with_plan<T>("norm_act_grad", kGradBlocks, shape, tensors, [&](const auto& plan) {
      using Layout = decltype(plan.layout);
      with_activation<T, Layout::kWidth>(act, [&](auto activation) {
        launch("norm_act_grad", grad_kernel<T, Layout, decltype(activation)>, plan.grid, plan.block,
               stream, plan.layout, affine, activation, static_cast<const Real<T>*>(sums), count,
               static_cast<int>(shape.channels), placed(plan, of<T>(grad)), placed(plan, of<T>(x)),
               placed(plan, of<T>(grad_x)));
      });
    });
  });
}

}  // namespace dmcp::cuda
