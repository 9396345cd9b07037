// The kernels of pointwise convolutions for one instruction set (see kernels.h).
//
// Every product is C = A B, with its operands laid out anew, in words of 32 bits along the
// contraction:
//   A  a row of words for each row of C
//   B  in panels: for each word of the contraction, those of kColumns columns side by side
// A word is two bfloat16 with AMX, which multiplies tiles of them, else one float. The instruction
// for pairs of bfloat16 in vectors (vdpbf16ps) is of no use: on Sapphire Rapids it multiplies twice
// as many numbers as one for floats, and takes four times as long.

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

namespace dmcp {
namespace {

constexpr int kColumns = kLanes<float>;  // of a panel

using Words = Vector<float>;  // of either kind

// C, in the memory of a tensor; what is there may be added to.
template <typename T>
struct Target {
  T* data;
  int64_t pitch, columns;
  bool add = false;

  T* at(int64_t row, int64_t column) const { return data + row * pitch + column; }

  template <typename Lanes>
  void write(T* to, Words values, Lanes lanes) const {
    if (add) values += load(to, lanes);
    store(to, values, lanes);
  }
  void put(int64_t row, int64_t column, Words values) const {
    T* to = at(row, column);
    if (columns - column >= kColumns)
      write(to, values, Whole{});
    else
      write(to, values, Part{static_cast<int>(columns - column)});
  }
};

// Of C, at most kRows rows and kPanels panels.
struct Block {
  int64_t row, column, rows, panels;
};

using cpu::Pointwise;

// --- A block of C: kRows rows, one to kPanels panels
// ----------------------------------------------

#ifdef __AMX_BF16__

constexpr int64_t kDepth = 2;  // values in a word
constexpr int64_t kTile = 16;  // rows of A, columns of B, words of the contraction
constexpr int64_t kStep = kTile;
constexpr int kRows = 2 * kTile;
constexpr int kPanels = 2;

// While there is one, this thread multiplies tiles: 0 to 3 of C, 4 and 5 of A, 6 and 7 of B.
class Tiles {
 public:
  Tiles() {
    Configuration configuration = {};
    configuration.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = kTile;
    }
    // The intrinsic tells the compiler of the first bytes only.
    asm volatile("ldtilecfg %0" ::"m"(configuration));
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  struct alignas(64) Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
};

template <int count, int panels>
DMCP_HOST_DEVICE void multiply_tiles(int64_t words, const float* a, const float* b, int64_t pitch,
                                     float* c) {
  asm volatile("" ::: "memory");  // the loads of tiles do not tell what they read
  _tile_zero(0);
  if constexpr (panels > 1) _tile_zero(1);
  if constexpr (count > 1) _tile_zero(2);
  if constexpr (count > 1 && panels > 1) _tile_zero(3);
  const int64_t row_bytes = pitch * sizeof(float);
  for (int64_t k = 0; k < words; k += kTile) {
    const float* panel = b + k * kColumns;
    _tile_loadd(4, a + k, row_bytes);
    _tile_loadd(6, panel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (panels > 1) {
      _tile_loadd(7, panel + pitch * kColumns, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (count > 1) {
      _tile_loadd(5, a + kTile * pitch + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
    }
    if constexpr (count > 1 && panels > 1) _tile_dpbf16ps(3, 5, 7);
  }
  constexpr int64_t kRowBytes = kPanels * kTile * sizeof(float);
  _tile_stored(0, c, kRowBytes);
  if constexpr (panels > 1) _tile_stored(1, c + kTile, kRowBytes);
  if constexpr (count > 1) _tile_stored(2, c + kTile * kPanels * kTile, kRowBytes);
  if constexpr (count > 1 && panels > 1)
    _tile_stored(3, c + kTile * kPanels * kTile + kTile, kRowBytes);
}

// Multiplies blocks. What a tile stores comes back late, and so does what a block is added to, so
// that it is put while the next one is multiplied.
template <typename T>
class Multiplier {
 public:
  explicit Multiplier(const Target<T>& target) : target_(target) {}
  ~Multiplier() { put_last(); }

  template <int panels>
  void multiply(int64_t words, const float* a, const float* b, int64_t pitch, const Block& block) {
    for (int64_t r = 0; r < block.rows; ++r) {
      const T* to = target_.at(block.row + r, block.column);
      __builtin_prefetch(to, 1);
      if constexpr (panels * kColumns * sizeof(T) > 64) __builtin_prefetch(to + kColumns, 1);
    }
    float* c = sums_[turn_];
    if (block.rows > kTile)
      multiply_tiles<2, panels>(words, a, b, pitch, c);
    else
      multiply_tiles<1, panels>(words, a, b, pitch, c);
    put_last();
    last_ = block;
    turn_ = 1 - turn_;
  }

 private:
  void put_last() const {
    const float* c = sums_[1 - turn_];
    for (int64_t r = 0; r < last_.rows; ++r)
      for (int64_t p = 0; p < last_.panels; ++p)
        target_.put(last_.row + r, last_.column + p * kColumns,
                    load(c + (r * kPanels + p) * kTile));
  }

  alignas(64) float sums_[2][kRows * kPanels * kTile];
  const Tiles tiles_;
  const Target<T> target_;
  Block last_ = {};
  int turn_ = 0;
};

#else

constexpr int64_t kDepth = 1;
constexpr int64_t kStep = 1;
constexpr int kRows = DMCP_VECTOR_BYTES == 64 ? 8 : 4;  // so that sums stay in registers
constexpr int kPanels = 3;

template <typename T>
class Multiplier {
 public:
  explicit Multiplier(const Target<T>& target) : target_(target) {}

  template <int panels>
  void multiply(int64_t words, const float* a, const float* b, int64_t pitch, const Block& block) {
    Words sums[kRows][panels] = {};
    for (int64_t k = 0; k < words; ++k) {
      Words columns[panels];
#pragma GCC unroll 3
      for (int p = 0; p < panels; ++p) columns[p] = load(b + (p * pitch + k) * kColumns);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
        for (int p = 0; p < panels; ++p) sums[r][p] += a[r * pitch + k] * columns[p];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (r == block.rows) break;
#pragma GCC unroll 3
      for (int p = 0; p < panels; ++p)
        target_.put(block.row + r, block.column + p * kColumns, sums[r][p]);
    }
  }

 private:
  const Target<T> target_;
};

#endif

// --- The operands of a product
// --------------------------------------------------------------------

// Words of a contraction of that length; `pitch` of them lie between rows of A, and pitch *
// kColumns between panels. What is behind the values is 0.
struct Contraction {
  int64_t length, words, pitch;

  explicit Contraction(int64_t length)
      : length(length),
        words(blocks_of(blocks_of(length, kDepth), kStep) * kStep),
        pitch(blocks_of(words, kColumns) * kColumns) {}

  int64_t panel() const { return pitch * kColumns; }
};

// body(k, Whole or Part) for vectors of `length` values; k is where they begin.
template <typename Body>
DMCP_HOST_DEVICE void for_vectors(int64_t length, const Body& body) {
  int64_t k = 0;
  for (; k + kColumns <= length; k += kColumns) body(k, Whole{});
  if (k < length) body(k, Part{static_cast<int>(length - k)});
}

#ifdef __AMX_BF16__

// A row of words from a row of values.
void lay_row(const Contraction& contraction, const BFloat16* from, float* to) {
  for (int64_t k = 0; k < contraction.pitch; k += kColumns) {
    const int64_t left = contraction.length - k * kDepth;
    const __mmask32 mask = left < 32 ? (uint32_t{1} << left) - 1 : ~uint32_t{0};
    _mm512_store_si512(to + k, _mm512_maskz_loadu_epi16(mask, from + k * kDepth));
  }
}

// Two vectors, one behind the other.
DMCP_HOST_DEVICE Words rounded(Words first, Words second) {
  return (Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}

void lay_row(const Contraction& contraction, const float* from, float* to) {
  for (int64_t k = 0; k < contraction.pitch; k += kColumns) {
    const int64_t left = contraction.length - k * kDepth;
    const float* values = from + k * kDepth;
    if (left >= 2 * kColumns)
      store(to + k, rounded(load(values), load(values + kColumns)));
    else if (left > kColumns)
      store(to + k,
            rounded(load(values), load(values + kColumns, static_cast<int>(left - kColumns))));
    else
      store(to + k, rounded(load(values, static_cast<int>(left)), Words{}));
  }
}

DMCP_HOST_DEVICE Halves halves(const BFloat16* p, Whole) { return read<Halves>(p); }
DMCP_HOST_DEVICE Halves halves(const BFloat16* p, Part part) {
  return (Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first(part.lanes)), p);
}

// Vectors of two rows, one behind the other.
template <typename Lanes>
DMCP_HOST_DEVICE Words both(const BFloat16* row, const BFloat16* next, Lanes lanes) {
  const __m512i half = _mm512_castsi256_si512((__m256i)halves(row, lanes));
  return (Words)_mm512_inserti64x4(half, (__m256i)halves(next, lanes), 1);
}
template <typename Lanes>
DMCP_HOST_DEVICE Words both(const float* row, const float* next, Lanes lanes) {
  return rounded(load(row, lanes), load(next, lanes));
}

// A row of a panel from one or two rows of values.
template <typename T, typename Lanes>
DMCP_HOST_DEVICE Words words_of(const T* from, int64_t from_pitch, Count<2>, Lanes lanes) {
  const __m512i in_turns =
      _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                       21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Words)_mm512_permutexvar_epi16(in_turns, (__m512i)both(from, from + from_pitch, lanes));
}
template <typename Lanes>
DMCP_HOST_DEVICE Words words_of(const BFloat16* from, int64_t, Count<1>, Lanes lanes) {
  return (Words)widen(halves(from, lanes));
}
template <typename Lanes>
DMCP_HOST_DEVICE Words words_of(const float* from, int64_t, Count<1>, Lanes lanes) {
  return (Words)widen(narrow_bfloat16(load(from, lanes)));
}

#else

// As it is multiplied: weights are rounded.
DMCP_HOST_DEVICE Words rounded(Words v) { return widen_bfloat16(narrow_bfloat16(v)); }

template <typename Lanes>
DMCP_HOST_DEVICE Words operand(const BFloat16* p, Lanes lanes) {
  return load(p, lanes);
}
template <typename Lanes>
DMCP_HOST_DEVICE Words operand(const float* p, Lanes lanes) {
  return rounded(load(p, lanes));
}

// A row of words from a row of values.
template <typename T>
void lay_row(const Contraction& contraction, const T* from, float* to) {
  for_vectors(contraction.length,
              [=](int64_t k, auto lanes) { store(to + k, operand(from + k, lanes)); });
  for (int64_t k = blocks_of(contraction.length, kColumns) * kColumns; k < contraction.pitch;
       k += kColumns)
    store(to + k, Words{});
}

template <typename T, typename Lanes>
DMCP_HOST_DEVICE Words words_of(const T* from, int64_t, Count<1>, Lanes lanes) {
  return operand(from, lanes);
}

#endif

// So many rows ahead are fetched: each is somewhere else in memory, where nobody expects it.
constexpr int64_t kAhead = 16;

template <typename T, typename Lanes>
DMCP_HOST_DEVICE void lay_panel(const Contraction& contraction, const T* from, int64_t from_pitch,
                                Lanes lanes, float* to) {
  const int64_t whole = contraction.length / kDepth;
  for (int64_t k = 0; k < whole; ++k) {
    const T* rows = from + k * kDepth * from_pitch;
    for (int64_t r = 0; r < kDepth; ++r) __builtin_prefetch(rows + (r + kAhead) * from_pitch);
    store(to + k * kColumns, words_of(rows, from_pitch, Count<kDepth>{}, lanes));
  }
  int64_t k = whole;
  if (contraction.length % kDepth) {
    store(to + k * kColumns,
          words_of(from + k * kDepth * from_pitch, from_pitch, Count<1>{}, lanes));
    ++k;
  }
  for (; k < contraction.pitch; ++k) store(to + k * kColumns, Words{});
}

// A panel from columns of values, whose rows are the contraction.
template <typename T>
void lay_panel(const Contraction& contraction, const T* from, int64_t from_pitch, int64_t columns,
               float* to) {
  if (columns < kColumns)
    lay_panel(contraction, from, from_pitch, Part{static_cast<int>(columns)}, to);
  else
    lay_panel(contraction, from, from_pitch, Whole{}, to);
}

// The two vectors that take the place of a and b where their lanes are rows of a matrix whose
// blocks of `size` x `size` change places over the diagonal.
template <int size, int left, int... lanes>
struct Exchange : Exchange<size, left - 1, left - 1, lanes...> {};

template <int size, int... lanes>
struct Exchange<size, 0, lanes...> {
#ifdef __clang__
#define DMCP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DMCP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
  DMCP_HOST_DEVICE Words first(Words a, Words b) {
    return DMCP_SHUFFLE(a, b, (lanes & size ? kColumns + lanes - size : lanes)...);
  }
  DMCP_HOST_DEVICE Words second(Words a, Words b) {
    return DMCP_SHUFFLE(a, b, (lanes & size ? kColumns + lanes : lanes + size)...);
  }
};

template <int size>
DMCP_HOST_DEVICE void exchange(Words* rows) {
  if constexpr (size < kColumns) {
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      if (i & size) continue;
      const Words a = rows[i], b = rows[i + size];
      rows[i] = Exchange<size, kColumns>::first(a, b);
      rows[i + size] = Exchange<size, kColumns>::second(a, b);
    }
    exchange<2 * size>(rows);
  }
}

// kColumns rows of kColumns words.
inline void transpose(const float* from, int64_t from_pitch, float* to, int64_t to_pitch) {
  Words rows[kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) rows[i] = load(from + i * from_pitch);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kColumns; ++i) store(to + i * to_pitch, rows[i]);
}

// A panel from rows of values: rows of words, transposed. `rows`: memory for these.
template <typename T>
void lay_panel_of_rows(const Contraction& contraction, const T* from, int64_t from_pitch,
                       int64_t count, float* rows, float* to) {
  for (int64_t i = 0; i < kColumns; ++i) {
    if (i < count)
      lay_row(contraction, from + i * from_pitch, rows + i * contraction.pitch);
    else
      for (int64_t k = 0; k < contraction.pitch; k += kColumns)
        store(rows + i * contraction.pitch + k, Words{});
  }
  for (int64_t k = 0; k < contraction.pitch; k += kColumns)
    transpose(rows + k, contraction.pitch, to + k * kColumns, kColumns);
}

// kColumns rows of A from columns of values: a panel, transposed. `panel`: memory for it.
template <typename T>
void lay_rows_of_columns(const Contraction& contraction, const T* from, int64_t from_pitch,
                         int64_t columns, float* panel, float* to) {
  lay_panel(contraction, from, from_pitch, columns, panel);
  for (int64_t k = 0; k < contraction.pitch; k += kColumns)
    transpose(panel + k * kColumns, kColumns, to + k, contraction.pitch);
}

// --- Blocks of a product
// --------------------------------------------------------------------------

constexpr int64_t kBlockRows = 64;        // of C, whose rows of A are laid out together
constexpr int64_t kJobs = 16;             // so many are enough for the threads to share
constexpr int64_t kWordsPerElement = 16;  // multiplications that take as long as an element

// What a call shares between its threads, and what each of them needs for itself.
thread_local Scratch shared, own;

// C from its rows of A and its panels of B.
template <typename T>
void multiply_panels(const Contraction& contraction, const float* a, int64_t rows, const float* b,
                     const Target<T>& target) {
  Multiplier<T> multiplier(target);
  for (int64_t row = 0; row < rows; row += kRows) {
    for (int64_t column = 0; column < target.columns; column += kPanels * kColumns) {
      const int64_t panels = smaller(blocks_of(target.columns - column, kColumns), kPanels);
      const Block block{row, column, smaller(rows - row, kRows), panels};
      const auto multiply = [&](auto count) {
        multiplier.template multiply<count.value>(contraction.words, a + row * contraction.pitch,
                                                  b + column * contraction.pitch, contraction.pitch,
                                                  block);
      };
      if (panels == kPanels)
        multiply(Count<kPanels>{});
      else if (panels == 2)
        multiply(Count<2>{});
      else
        multiply(Count<1>{});
    }
  }
}

constexpr int64_t padded_rows(int64_t rows) { return blocks_of(rows, kRows) * kRows; }

// y = x B with `depth` columns of x; lay(contraction, panel, memory for its rows, to) lays out a
// panel of B. Jobs are blocks of rows, or of columns where rows are few: a job lays out what it
// alone needs of one operand, and the other one is laid out before.
template <typename T, typename Lay>
void product(int64_t rows, int64_t depth, int64_t columns, Pitched<const T> x, Pitched<T> y,
             const Lay& lay) {
  const Contraction contraction(depth);
  const int64_t panels = blocks_of(columns, kColumns), tiles = blocks_of(panels, kPanels);
  const int64_t blocks = blocks_of(rows, kBlockRows);
  const int64_t work = rows * depth * columns / kWordsPerElement;
  const auto lay_rows = [=](int64_t row, int64_t count, float* a) {
    for (int64_t r = 0; r < count; ++r)
      lay_row(contraction, x.data + (row + r) * x.pitch, a + r * contraction.pitch);
  };

  if (blocks >= smaller(tiles, kJobs)) {
    float* b = shared.take<float>(panels * contraction.panel());
    for_blocks(panels, depth * columns, Direction::forwards, [=](int64_t panel) {
      lay(contraction, panel, own.take<float>(contraction.panel()),
          b + panel * contraction.panel());
    });
    for_blocks(blocks, work, Direction::forwards, [=](int64_t block) {
      const int64_t row = block * kBlockRows, count = smaller(rows - row, kBlockRows);
      float* a = own.take<float>(kBlockRows * contraction.pitch);
      lay_rows(row, count, a);
      multiply_panels(contraction, a, count, b,
                      Target<T>{y.data + row * y.pitch, y.pitch, columns});
    });
    return;
  }
  float* a = shared.take<float>(blocks * kBlockRows * contraction.pitch);
  for_blocks(blocks, rows * depth, Direction::forwards, [=](int64_t block) {
    const int64_t row = block * kBlockRows;
    lay_rows(row, smaller(rows - row, kBlockRows), a + row * contraction.pitch);
  });
  for_blocks(tiles, work, Direction::forwards, [=](int64_t tile) {
    const int64_t first = tile * kPanels, end = smaller(panels, first + kPanels);
    float* b = own.take<float>((kPanels + 1) * contraction.panel());
    float* memory = b + kPanels * contraction.panel();
    for (int64_t panel = first; panel < end; ++panel)
      lay(contraction, panel, memory, b + (panel - first) * contraction.panel());
    const int64_t column = first * kColumns;
    const int64_t width = smaller(columns - column, kPanels * kColumns);
    multiply_panels(contraction, a, rows, b, Target<T>{y.data + column, y.pitch, width});
  });
}

template <typename T>
void forward_of(const Pointwise& conv, Pitched<const T> x, Pitched<const float> weight,
                Pitched<T> y) {
  product<T>(conv.rows, conv.inputs, conv.outputs, x, y,
             [=](const Contraction& contraction, int64_t panel, float* rows, float* to) {
               const int64_t first = panel * kColumns;
               lay_panel_of_rows(contraction, weight.data + first * weight.pitch, weight.pitch,
                                 conv.outputs - first, rows, to);
             });
}

template <typename T>
void grad_input_of(const Pointwise& conv, Pitched<const T> grad, Pitched<const float> weight,
                   Pitched<T> grad_x) {
  product<T>(conv.rows, conv.outputs, conv.inputs, grad, grad_x,
             [=](const Contraction& contraction, int64_t panel, float*, float* to) {
               const int64_t first = panel * kColumns;
               lay_panel(contraction, weight.data + first, weight.pitch, conv.inputs - first, to);
             });
}

// --- The gradient of the weight
// -------------------------------------------------------------------

constexpr int64_t kSlabRows = 512;           // of activations, at least; multiplied at one go
constexpr int64_t kSlabs = 32;               // at most
constexpr int64_t kSums = int64_t{1} << 20;  // of all slabs, at most
constexpr int64_t kFewSlabs = 8;             // fewer than that leave threads without work

// Whole slabs as jobs, their sums added up in their order.
template <typename T>
void grad_weight_of_slabs(const Pointwise& conv, int64_t slabs, Pitched<const T> grad,
                          Pitched<const T> x, Pitched<float> into, bool add) {
  const int64_t slab_rows = blocks_of(conv.rows, slabs);
  const int64_t row_words = blocks_of(conv.inputs, kColumns) * kColumns;
  const int64_t sum_words = conv.outputs * row_words;
  float* sums = shared.take<float>(slabs * sum_words);
  const int64_t work = conv.rows * conv.inputs * conv.outputs / kWordsPerElement;
  for_blocks(slabs, work, Direction::forwards, [=](int64_t slab) {
    const int64_t row = slab * slab_rows;
    const Contraction contraction(smaller(slab_rows, conv.rows - row));
    const int64_t a_words =
        padded_rows(blocks_of(conv.outputs, kColumns) * kColumns) * contraction.pitch;
    float* a = own.take<float>(a_words + row_words * contraction.pitch + contraction.panel());
    float *b = a + a_words, *panel = b + row_words * contraction.pitch;
    for (int64_t o = 0; o < conv.outputs; o += kColumns)
      lay_rows_of_columns(contraction, grad.data + row * grad.pitch + o, grad.pitch,
                          conv.outputs - o, panel, a + o * contraction.pitch);
    for (int64_t i = 0; i < conv.inputs; i += kColumns)
      lay_panel(contraction, x.data + row * x.pitch + i, x.pitch, conv.inputs - i,
                b + i * contraction.pitch);
    float* to = sums + slab * sum_words;
    multiply_panels(contraction, a, conv.outputs, b, Target<float>{to, row_words, row_words});
  });
  const Target<float> target{into.data, into.pitch, conv.inputs, add};
  for_blocks(conv.outputs, slabs * sum_words, Direction::forwards, [=](int64_t o) {
    for_vectors(conv.inputs, [=](int64_t i, auto lanes) {
      Words sum = {};
      for (int64_t slab = 0; slab < slabs; ++slab)
        sum += load(sums + slab * sum_words + o * row_words + i);
      target.write(target.at(o, i), sum, lanes);
    });
  });
}

// All rows at once, and blocks of the result as jobs.
template <typename T>
void grad_weight_of_blocks(const Pointwise& conv, Pitched<const T> grad, Pitched<const T> x,
                           Pitched<float> into, bool add) {
  const Contraction contraction(conv.rows);
  const int64_t row_panels = blocks_of(conv.outputs, kColumns);
  const int64_t panels = blocks_of(conv.inputs, kColumns);
  const int64_t a_words = padded_rows(row_panels * kColumns) * contraction.pitch;
  float* a = shared.take<float>(a_words + panels * contraction.panel());
  float* b = a + a_words;
  const int64_t elements = conv.rows * (conv.inputs + conv.outputs);
  for_blocks(row_panels + panels, elements, Direction::forwards, [=](int64_t job) {
    const int64_t o = job * kColumns, i = o - row_panels * kColumns;
    if (i < 0)
      lay_rows_of_columns(contraction, grad.data + o, grad.pitch, conv.outputs - o,
                          own.take<float>(contraction.panel()), a + o * contraction.pitch);
    else
      lay_panel(contraction, x.data + i, x.pitch, conv.inputs - i, b + i * contraction.pitch);
  });
  // About equal, in whole panels, and along the rows of the result, which lie behind each other.
  const int64_t block_panels = blocks_of(row_panels, blocks_of(conv.outputs, kBlockRows));
  const int64_t block_rows = block_panels * kColumns, blocks = blocks_of(row_panels, block_panels);
  const int64_t tiles = blocks_of(panels, kPanels);
  const int64_t job_tiles = larger(1, smaller(tiles, blocks * tiles / kJobs));
  const int64_t job_columns = job_tiles * kPanels * kColumns;
  const int64_t row_jobs = blocks_of(tiles, job_tiles);
  const int64_t work = conv.rows * conv.inputs * conv.outputs / kWordsPerElement;
  for_blocks(blocks * row_jobs, work, Direction::forwards, [=](int64_t job) {
    const int64_t o = job / row_jobs * block_rows, i = job % row_jobs * job_columns;
    const int64_t columns = smaller(conv.inputs - i, job_columns);
    multiply_panels(contraction, a + o * contraction.pitch, smaller(conv.outputs - o, block_rows),
                    b + i * contraction.pitch,
                    Target<float>{into.data + o * into.pitch + i, into.pitch, columns, add});
  });
}

// --- The table
// ------------------------------------------------------------------------------------

void forward(const Pointwise& conv, Pitched<const void> x, Pitched<const float> weight,
             Pitched<void> y) {
  forward_of(conv, of<BFloat16>(x), weight, of<BFloat16>(y));
}

void grad_input(const Pointwise& conv, Pitched<const void> grad, Pitched<const float> weight,
                Pitched<void> grad_x) {
  grad_input_of(conv, of<BFloat16>(grad), weight, of<BFloat16>(grad_x));
}

void grad_weight(const Pointwise& conv, Pitched<const void> grad, Pitched<const void> x,
                 Pitched<float> into, bool add) {
  const int64_t fitting = smaller(kSlabs, kSums / (conv.inputs * conv.outputs));
  const int64_t slabs = smaller(fitting, conv.rows / kSlabRows);
  if (slabs >= kFewSlabs)
    grad_weight_of_slabs(conv, slabs, of<BFloat16>(grad), of<BFloat16>(x), into, add);
  else
    grad_weight_of_blocks(conv, of<BFloat16>(grad), of<BFloat16>(x), into, add);
}

}  // namespace

namespace cpu {

extern const PointwiseKernels DMCP_KERNELS;
const PointwiseKernels DMCP_KERNELS = {forward, grad_input, grad_weight};

}  // namespace cpu
}  // namespace dmcp
