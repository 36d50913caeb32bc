// A residual sum and its LayerNorm on the CPU: rows are divided among threads.
#include "kernels.h"
#include "ops.h"
#include "pages.h"
#include "rows.h"

namespace maskcf {
namespace {

const char* rows_of(const std::optional<Tensor>& x) {
  return x ? static_cast<const char*>(x->const_data_ptr()) : nullptr;
}
const char* at(const char* rows, int64_t bytes) { return rows ? rows + bytes : nullptr; }

std::tuple<Tensor, Tensor> residual_norm(Tensor x, std::optional<Tensor> branch, Tensor weight, Tensor bias,
                                         double eps) {
  check_rows(x, weight, "weight");
  if (branch) check_like(*branch, x);
  check_like(bias, weight);
  const Element element = element_of(x.scalar_type());
  const int64_t width = weight.size(0), rows = x.numel() / width, bytes = width * int64_t(x.element_size());
  Tensor total = branch ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor normed = torch::stable::empty_like(x);
  const char *from = rows_of(x), *added = rows_of(branch);
  char *sum = static_cast<char*>(total.mutable_data_ptr()), *to = static_cast<char*>(normed.mutable_data_ptr());
  if (branch) prefer_large_pages(sum, rows * bytes);
  prefer_large_pages(to, rows * bytes);
  torch::stable::parallel_for(0, rows, row_grain(width), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * bytes;
    kernels().residual_norm(element, {weight.const_data_ptr(), bias.const_data_ptr(), eps, end - begin, width},
                            {from + first, at(added, first), added ? sum + first : nullptr, to + first});
  });
  return {total, normed};
}

std::tuple<Tensor, Tensor, Tensor> residual_norm_backward(std::optional<Tensor> grad_total, Tensor grad_normed,
                                                          Tensor total, Tensor weight, double eps) {
  check_rows(total, weight, "weight");
  check_like(grad_normed, total);
  if (grad_total) check_like(*grad_total, total);
  const Element element = element_of(total.scalar_type());
  const int64_t width = weight.size(0), rows = total.numel() / width, bytes = width * int64_t(total.element_size());
  Tensor grad = torch::stable::empty_like(total);
  Tensor weight_grad = torch::stable::empty_like(weight), bias_grad = torch::stable::empty_like(weight);
  prefer_large_pages(grad.mutable_data_ptr(), rows * bytes);
  const char *of_total = rows_of(grad_total), *of_normed = rows_of(grad_normed), *sum = rows_of(total);
  char* to = static_cast<char*>(grad.mutable_data_ptr());
  for_wide_type(weight.scalar_type(), "weight", [&](auto zero) {
    using W = decltype(zero);
    sum_over_rows<W, 2>(
        rows, width,
        {static_cast<W*>(weight_grad.mutable_data_ptr()), static_cast<W*>(bias_grad.mutable_data_ptr())},
        [&](int64_t row, int64_t count, W* sums) {
          const int64_t first = row * bytes;
          kernels().residual_norm_backward(
              element, {weight.const_data_ptr(), nullptr, eps, count, width},
              {at(of_total, first), of_normed + first, sum + first, to + first, sums, sums + width});
        });
  });
  return {grad, weight_grad, bias_grad};
}

}  // namespace
}  // namespace maskcf

STABLE_TORCH_LIBRARY_IMPL(maskcf, CPU, m) {
  m.impl("residual_norm", TORCH_BOX(&maskcf::residual_norm));
  m.impl("residual_norm_backward", TORCH_BOX(&maskcf::residual_norm_backward));
}
