#pragma once
#include <tuple>

#include "shared/arguments.h"

namespace flashmark {

// (out, lse, residual of lse); the last empty where there is no bias
std::tuple<Tensor, Tensor, Tensor> forward(const AttentionArguments& arguments);

// (dquery, dkey, dvalue, dbias, dsinks); the last two undefined where there is no bias, no sinks
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(const AttentionArguments& arguments,
                                                            const Tensor& dout,
                                                            const OptionalTensor& dlse,
                                                            const Tensor& out, const Tensor& lse,
                                                            const Tensor& residual);

}  // namespace flashmark
