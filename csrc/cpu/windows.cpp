#include "cpu/windows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <vector>

namespace dmcp::cpu {

namespace {

constexpr int64_t kParallelBytes = 1 << 16;  // below, threads cost more than they save

int64_t size_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

float widened(float value) { return value; }
double widened(double value) { return value; }
float widened(uint16_t bits) {
  const uint32_t word = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

void narrow(float value, float& result) { result = value; }
void narrow(double value, double& result) { result = value; }
// To the nearest, ties to even; a NaN stays one.
void narrow(float value, uint16_t& result) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t rounded = word + 0x7fff + ((word >> 16) & 1);
  result = value == value ? static_cast<uint16_t>(rounded >> 16) : 0x7fc0;
}

// Along one axis: for every pixel its windows, as (window, tap) pairs, those of pixel p from
// first[p] to first[p + 1], in the order of the taps.
struct Holders {
  std::vector<int64_t> window, tap, first;

  Holders(int64_t pixels, int64_t windows, int64_t taps, int64_t stride, int64_t padding,
          int64_t dilation) {
    first.push_back(0);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t offset = pixel + padding - t * dilation;
        if (offset < 0 || offset % stride != 0 || offset / stride >= windows) continue;
        window.push_back(offset / stride);
        tap.push_back(t);
      }
      first.push_back(static_cast<int64_t>(tap.size()));
    }
  }
};

template <typename T>
void scatter(const Windows& w, const T* matrix, T* images) {
  using S = decltype(widened(T()));
  const int64_t rows = w.rows(), columns = w.columns(), channels = w.channels;
  const int64_t length = w.kernel_height * w.kernel_width * channels;
  const int64_t lines = w.batch * w.height;
  const Holders down(w.height, rows, w.kernel_height, w.stride_height, w.padding_height,
                     w.dilation_height);
  const Holders along(w.width, columns, w.kernel_width, w.stride_width, w.padding_width,
                      w.dilation_width);
#ifdef _OPENMP
#pragma omp parallel if (lines * w.width * length * sizeof(T) > kParallelBytes)
#endif
  {
    std::vector<S> line_sums(w.width * channels);
#ifdef _OPENMP
#pragma omp for schedule(static)
#endif
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t image = line / w.height, y = line % w.height;
      std::fill(line_sums.begin(), line_sums.end(), S(0));
      for (int64_t i = down.first[y]; i < down.first[y + 1]; ++i) {
        const T* windows = matrix + (image * rows + down.window[i]) * columns * length +
                           down.tap[i] * w.kernel_width * channels;
        for (int64_t x = 0; x < w.width; ++x) {
          S* sums = line_sums.data() + x * channels;
          for (int64_t j = along.first[x]; j < along.first[x + 1]; ++j) {
            const T* terms = windows + along.window[j] * length + along.tap[j] * channels;
            for (int64_t c = 0; c < channels; ++c) sums[c] += widened(terms[c]);
          }
        }
      }
      T* pixels = images + line * w.width * channels;
      for (int64_t c = 0; c < w.width * channels; ++c) narrow(line_sums[c], pixels[c]);
    }
  }
}

}  // namespace

void gather_windows(const Windows& w, Pitched<const void> images, void* matrix) {
  const int64_t size = size_of(w.dtype), bytes = w.channels * size;
  const int64_t rows = w.rows(), columns = w.columns();
  const int64_t window = w.kernel_height * w.kernel_width * bytes, lines = w.batch * rows;
  const char* source = static_cast<const char*>(images.data);
  char* target = static_cast<char*>(matrix);
#ifdef _OPENMP
#pragma omp parallel for schedule(static) if (lines * columns * window > kParallelBytes)
#endif
  for (int64_t line = 0; line < lines; ++line) {
    const int64_t image = line / rows, top = line % rows * w.stride_height - w.padding_height;
    char* to = target + line * columns * window;
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t left = column * w.stride_width - w.padding_width;
      for (int64_t i = 0; i < w.kernel_height; ++i) {
        const int64_t y = top + i * w.dilation_height;
        for (int64_t j = 0; j < w.kernel_width; ++j, to += bytes) {
          const int64_t x = left + j * w.dilation_width;
          if (y < 0 || y >= w.height || x < 0 || x >= w.width) {
            std::memset(to, 0, bytes);
          } else {
            const int64_t pixel = (image * w.height + y) * w.width + x;
            std::memcpy(to, source + pixel * images.pitch * size, bytes);
          }
        }
      }
    }
  }
}

void scatter_windows(const Windows& windows, const void* matrix, void* images) {
  switch (windows.dtype) {
    case DType::float32:
      return scatter(windows, static_cast<const float*>(matrix), static_cast<float*>(images));
    case DType::float64:
      return scatter(windows, static_cast<const double*>(matrix), static_cast<double*>(images));
    case DType::bfloat16:
      return scatter(windows, static_cast<const uint16_t*>(matrix),
                     static_cast<uint16_t*>(images));
    default:
      throw std::invalid_argument("scatter_windows: float16 is not supported");
  }
}

}  // namespace dmcp::cpu
