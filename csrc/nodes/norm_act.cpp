#include "nodes/norm_act.h"

#include <ATen/Dispatch.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "nodes/gradients.h"
#include "nodes/kernels.h"

namespace dmcp::nodes {

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::MemoryFormat format_of(const Tensor& x) {
  return x.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                         : at::MemoryFormat::Contiguous;
}

Shape shape_of(const Tensor& x) {
  const int64_t batch = x.size(0), channels = x.size(1);
  return {batch, channels, x.numel() / (batch * channels),
          format_of(x) == at::MemoryFormat::ChannelsLast, dtype_of(x)};
}

int64_t pitch_of(const Shape& shape) {
  return shape.channels_last ? shape.channels : shape.channels * shape.pixels;
}

const void* read(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

void* written(const Tensor& tensor) { return tensor.defined() ? tensor.data_ptr() : nullptr; }

Pitched<const void> read(const Tensor& tensor, const Shape& shape) {
  return {read(tensor), pitch_of(shape)};
}

Pitched<void> written(const Tensor& tensor, const Shape& shape) {
  return {written(tensor), pitch_of(shape)};
}

void* row(const Tensor& matrix, int64_t index) {
  return static_cast<char*>(matrix.data_ptr()) + index * matrix.size(1) * matrix.element_size();
}

// The vectors as a kernel reads them; to be kept until it has run.
class Vectors {
 public:
  Vectors(const Tensor& moments, const Norm& norm)
      : moments_(moments.contiguous()),
        weight_(dense(norm.weight)),
        bias_(dense(norm.bias)),
        scale_(dense(norm.scale)),
        eps_(norm.eps) {}

  Affine affine() const {
    return {row(moments_, 0), row(moments_, 1), read(weight_), read(bias_), read(scale_), eps_};
  }

 private:
  static Tensor dense(const Tensor& vector) {
    return vector.defined() ? vector.contiguous() : vector;
  }

  Tensor moments_, weight_, bias_, scale_;
  double eps_;
};

// Running statistics as a kernel writes them: where they lie if they are dense.
class Updated {
 public:
  explicit Updated(const Tensor& given)
      : given_(given), dense_(given.defined() ? given.contiguous() : given) {}

  void* data() const { return written(dense_); }

  void done() const {
    if (!given_.defined()) return;
    if (!dense_.is_same(given_)) given_.copy_(dense_);
    given_.unsafeGetTensorImpl()->bump_version();  // a backward that saved it has to notice
  }

 private:
  Tensor given_, dense_;
};

template <typename S>
void add_values(const S* values, int64_t count, int64_t stride, S* to) {
  for (int64_t i = 0; i < count; ++i) to[i * stride] += values[i];
}

void add_row(const Tensor& target, const Tensor& sums, int64_t index) {
  if (!target.defined()) return;
  const int64_t count = sums.size(1), stride = target.stride(0);
  const bool is_vector = target.dim() == 1 && target.size(0) >= count && (stride || count == 1);
  if (!is_vector || target.scalar_type() != sums.scalar_type()) {
    target.narrow(0, 0, count).add_(sums.select(0, index));
    return;
  }
  // Views and operators take longer than the sums of a layer.
  AT_DISPATCH_FLOATING_TYPES(sums.scalar_type(), "add_row", [&] {
    add_values(sums.const_data_ptr<scalar_t>() + index * count, count, stride,
               target.mutable_data_ptr<scalar_t>());
  });
}

// Whether a vector has the values of so many channels of x, or more where they may be a prefix.
bool fits(const Tensor& vector, const Tensor& x, int64_t channels, bool is_prefix) {
  if (!vector.defined()) return true;
  return vector.dim() == 1 && vector.is_cpu() && vector.scalar_type() == vector_dtype(x) &&
         (vector.size(0) == channels || (is_prefix && vector.size(0) > channels));
}

// The node of norm_act_train.
class NormAct : public torch::autograd::Function<NormAct> {
 public:
  // Differentiable tensors apart, so that each is an edge of the graph.
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                        const std::optional<Tensor>& residual, const Norm& norm) {
    const at::AutoDispatchBelowADInplaceOrView below;
    auto [y, moments] = normalise(x, norm);
    const Tensor kept = norm.place == Residual::before ? norm.residual : Tensor();
    ctx->save_for_backward({x, moments, norm.weight, norm.bias, norm.scale, kept});
    ctx->saved_data["eps"] = norm.eps;
    ctx->saved_data["act"] = static_cast<int64_t>(norm.act);
    ctx->saved_data["residual"] = norm.residual.defined();
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    Norm norm{saved[2], saved[3], saved[4], saved[5]};
    norm.eps = ctx->saved_data["eps"].toDouble();
    norm.act = static_cast<Act>(ctx->saved_data["act"].toInt());
    Wanted wanted(*ctx);
    const bool wants_x = wanted.next(), wants_weight = wanted.next(norm.weight.defined());
    const bool wants_bias = wanted.next(norm.bias.defined());
    const bool wants_scale = wanted.next(norm.scale.defined());
    const bool wants_residual = wanted.next(ctx->saved_data["residual"].toBool());
    variable_list found(6);
    {
      const at::AutoDispatchBelowADInplaceOrView below;
      // Whoever hooks saved tensors may give them back with other strides.
      const Tensor x = saved[0].contiguous(format_of(saved[0]));
      const Gradients all = gradients(grads[0], x, saved[1], norm, {}, {}, wants_x);
      found[0] = all.x;
      if (wants_weight) found[1] = all.sums.select(0, 1);
      if (wants_bias) found[2] = all.sums.select(0, 0);
      if (wants_scale) found[3] = all.sums.select(0, 2);
      if (wants_residual) found[4] = all.residual;
    }
    forbid_second_derivatives(found, grads[0]);
    return found;
  }
};

// None where the arguments are not what the node takes: whoever calls finds out why, or how to do
// without it.
std::optional<Tensor> norm_act(const Tensor& x, const std::optional<Tensor>& weight,
                               const std::optional<Tensor>& bias,
                               const std::optional<Tensor>& scale,
                               const std::optional<Tensor>& residual,
                               const std::optional<Tensor>& running_mean,
                               const std::optional<Tensor>& running_var, double momentum,
                               double eps, int64_t act, bool before) {
  const Norm norm =
      norm_of(weight, bias, scale, residual, running_mean, running_var, momentum, eps, act, before);
  const bool is_dense = x.is_contiguous() || x.is_contiguous(at::MemoryFormat::ChannelsLast);
  if (!has_kernels(x) || x.dim() < 2 || !is_dense) return std::nullopt;
  if (!takes(x.sizes(), x, norm, /*is_prefix=*/false)) return std::nullopt;
  return NormAct::apply(x, weight, bias, scale, residual, norm);
}

}  // namespace

Norm norm_of(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
             const std::optional<Tensor>& scale, const std::optional<Tensor>& residual,
             const std::optional<Tensor>& running_mean, const std::optional<Tensor>& running_var,
             double momentum, double eps, int64_t act, bool before) {
  const Tensor none;
  return {weight.value_or(none),
          bias.value_or(none),
          scale.value_or(none),
          residual.value_or(none),
          running_mean.value_or(none),
          running_var.value_or(none),
          momentum,
          eps,
          static_cast<Act>(act),
          before ? Residual::before : Residual::after};
}

bool takes(at::IntArrayRef sizes, const Tensor& x, const Norm& norm, bool is_prefix) {
  const int64_t values = c10::multiply_integers(sizes), channels = sizes[1];
  if (values == 0 || values < 2 * channels) return false;
  if (norm.act < Act::identity || norm.act > Act::silu) return false;
  if (norm.running_mean.defined() != norm.running_var.defined()) return false;
  for (const Tensor* vector : {&norm.weight, &norm.bias})
    if (!fits(*vector, x, channels, is_prefix)) return false;
  for (const Tensor* vector : {&norm.scale, &norm.running_mean, &norm.running_var})
    if (!fits(*vector, x, channels, false)) return false;
  const Tensor& residual = norm.residual;
  return !residual.defined() || (residual.is_cpu() && residual.sizes() == sizes &&
                                 residual.scalar_type() == x.scalar_type());
}

Normalised normalise(const Tensor& x, const Norm& norm) {
  const Shape shape = shape_of(x);
  const cpu::NormActKernels& run = norm_act_kernels(shape.dtype);
  Normalised result{at::empty_like(x),
                    at::empty({2, x.size(1)}, x.options().dtype(vector_dtype(x)))};
  const Updated mean(norm.running_mean), var(norm.running_var);
  run.stats(shape, read(x, shape), row(result.moments, 0), row(result.moments, 1), mean.data(),
            var.data(), norm.momentum);
  mean.done();
  var.done();
  const Tensor residual =
      norm.residual.defined() ? norm.residual.contiguous(format_of(x)) : norm.residual;
  const Vectors vectors(result.moments, norm);
  run.forward(shape, vectors.affine(), norm.act, residual.defined() ? norm.place : Residual::none,
              read(x, shape), read(residual, shape), written(result.y, shape));
  return result;
}

Gradients gradients(const Tensor& grad, const Tensor& x, const Tensor& moments, const Norm& norm,
                    const Tensor& add_weight, const Tensor& add_bias, bool wants_x) {
  const Shape shape = shape_of(x);
  const cpu::NormActKernels& run = norm_act_kernels(shape.dtype);
  const Vectors vectors(moments, norm);
  const Affine affine = vectors.affine();
  const Tensor incoming = grad.contiguous(format_of(x));
  Gradients found{{}, at::empty({3, x.size(1)}, moments.options()), grad};
  Tensor seen = incoming, residual;
  Act left = norm.act;
  if (norm.residual.defined()) {
    residual = norm.residual.contiguous(format_of(x));
    found.residual = seen = at::empty_like(x);
    left = Act::identity;  // the activation is behind us then
  }
  run.sums(shape, affine, norm.act, read(incoming, shape), read(x, shape), read(residual, shape),
           residual.defined() ? written(seen, shape) : Pitched<void>{}, found.sums.data_ptr());
  if (wants_x) {
    found.x = at::empty_like(x);
    run.grad(shape, affine, left, found.sums.data_ptr(), static_cast<double>(shape.count()),
             read(seen, shape), read(x, shape), written(found.x, shape));
  }
  add_row(add_bias, found.sums, 0);
  add_row(add_weight, found.sums, 1);
  return found;
}

TORCH_LIBRARY_FRAGMENT(dmcp, library) {
  library.def(
      "norm_act_node(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? residual, "
      "Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, int act, "
      "bool before) -> Tensor?",
      &norm_act);
}

}  // namespace dmcp::nodes
