// What the host sides share: tensors by torch's stable ABI, outputs, and the two ways in: the operators (flashmla_hf/
// ops.py defines them) and direct.h.
#pragma once

#include <cstdio>
#include <tuple>

#include "direct.h"
#include "tensors.h"

namespace flashmla {

// What both operators have in common, in the order of their schemas: the one place of C++ that spells this list for
// torch.
inline Arguments arguments_of(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& sinks,
                              const std::optional<Tensor>& cu_seqlens_q, const std::optional<Tensor>& cu_seqlens_kv,
                              int64_t max_seqlen_q, int64_t max_seqlen_kv, double scale, int64_t window_left,
                              int64_t window_right, double softcap, bool deterministic) {
  return {info_of(q),   info_of(k),    info_of(v), info_of(sinks), info_of(cu_seqlens_q), info_of(cu_seqlens_kv),
          max_seqlen_q, max_seqlen_kv, scale,      window_left,    window_right,          softcap,
          deterministic};
}

// Both ways into a backend, from what it has of its own:
//   check(op, arguments) -> Problem                            refuses what it does not compute
//   can_read(info), make_readable(tensor)                      whether dout and out must be copied first, and the copy
//   run_forward(op, params, arguments, out), run_backward(op, params, arguments, tensors)
//   check_decode(op, arguments) -> Problem, run_decode(op, params, arguments, out)   the same for DecodeArguments
template <class Backend>
struct Host {
  // A backward call's own inputs, before they are copied where a kernel cannot read them.
  struct BackwardInputs {
    const Tensor& dout;
    const std::optional<Tensor>& dlse;
    const Tensor &out, &lse;
    bool needs_dq, needs_dk, needs_dv, needs_dsinks;
  };

  template <class CallArguments>
  static std::tuple<Tensor, Tensor> forward_of(const char* op, const CallArguments& arguments) {
    const Problem p = Backend::check(op, arguments);
    const TensorInfo& like = arguments.q;
    const bool is_packed = p.cu_seqlens_q != nullptr;
    std::vector<int64_t> out_shape = like.shape();
    out_shape.back() = p.head_dim_v;
    const Tensor out = make_tensor(like, out_shape, scalar_type_of(p.dtype));
    const Tensor lse = make_tensor(
        like,
        is_packed ? std::vector<int64_t>{p.heads_q, p.total_q} : std::vector<int64_t>{p.batch, p.heads_q, p.seqlen_q},
        ScalarType::Float);
    const TensorInfo out_info = info_of(out);
    Backend::run_forward(op, forward_params(p, arguments, out_info, info_of(lse)), arguments, out_info);
    return {out, lse};
  }

  template <class CacheArguments>
  static std::tuple<Tensor, Tensor> decode_of(const char* op, const CacheArguments& arguments) {
    const Problem p = Backend::check_decode(op, arguments);
    const TensorInfo& like = arguments.q;
    const Tensor out = make_tensor(like, {p.batch, p.seqlen_q, p.heads_q, p.head_dim_v}, like.dtype);
    const Tensor lse = make_tensor(like, {p.batch, p.heads_q, p.seqlen_q}, ScalarType::Float);
    const TensorInfo out_info = info_of(out);
    Backend::run_decode(op, decode_params(p, arguments, out_info, info_of(lse)), arguments, out_info);
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward_of(const char* op, const Arguments& arguments,
                                                                const BackwardInputs& inputs) {
    const auto& [dout, dlse, out, lse, needs_dq, needs_dk, needs_dv, needs_dsinks] = inputs;
    const Problem p = Backend::check(op, arguments);
    BackwardTensors tensors{info_of(dout), info_of(out), info_of(lse), info_of(dlse), {}, {}, {}, {}};
    check_saved(op, p, arguments.q, tensors);
    if (needs_dsinks && p.sinks == nullptr) fail(op, "needs_dsinks", "False, since sinks is None", "True");

    // Copies are kept until the kernels are launched.
    const Tensor readable_dout = Backend::make_readable(dout), readable_out = Backend::make_readable(out);
    auto contiguous_rows = [](const Tensor& t) {
      const TensorInfo info = info_of(t);
      return has_contiguous_rows(info) ? t : make_copy(info, t);
    };
    const Tensor lse_rows = contiguous_rows(lse), dlse_rows = contiguous_rows(dlse.value_or(lse));
    tensors.dout = info_of(readable_dout);
    tensors.out = info_of(readable_out);
    tensors.lse = info_of(lse_rows);
    if (dlse.has_value()) tensors.dlse = info_of(dlse_rows);

    // Gradients as their inputs, empty where not needed.
    auto make_gradient = [&](bool is_needed, const TensorInfo& like, std::vector<int64_t> shape, ScalarType dtype,
                             std::optional<TensorInfo>& info) {
      const Tensor gradient = make_tensor(like, is_needed ? shape : std::vector<int64_t>{0}, dtype);
      if (is_needed) info = info_of(gradient);
      return gradient;
    };
    auto as_input = [&](bool is_needed, const TensorInfo& like, std::optional<TensorInfo>& info) {
      return make_gradient(is_needed, like, like.shape(), like.dtype, info);
    };
    const Tensor dq = as_input(needs_dq, arguments.q, tensors.dq), dk = as_input(needs_dk, arguments.k, tensors.dk),
                 dv = as_input(needs_dv, arguments.v, tensors.dv),
                 dsinks = make_gradient(needs_dsinks, arguments.q, {p.heads_q}, ScalarType::Float, tensors.dsinks);
    if (needs_dq || needs_dk || needs_dv || needs_dsinks)
      Backend::run_backward(op, backward_params(p, arguments, tensors), arguments, tensors);
    return {dq, dk, dv, dsinks};
  }

  // check() throws if the operator is to be called instead; an exception of run() is an error of the call.
  template <class Check, class Run>
  static DirectResult directly(DirectError& failure, const Check& check, const Run& run) {
    Problem p;
    try {
      p = check();
    } catch (const std::exception&) {
      return kDirectNotApplicable;
    }
    try {
      run(p);
    } catch (const AllocationFailure& error) {
      failure.bytes = error.bytes;
      return kDirectOutOfMemory;
    } catch (const std::exception& error) {
      std::snprintf(failure.message, sizeof(failure.message), "%s", error.what());
      return kDirectFailed;
    }
    return kDirectDone;
  }

  static DirectResult direct_forward(const DirectForward& call, DirectError& failure) {
    const char* op = "flash_attn_forward";
    const Arguments& arguments = call.arguments;
    auto check = [&] {
      const Problem p = Backend::check(op, arguments);
      check_out(op, "out", p, arguments.q, call.out);
      if (call.lse) check_rows(op, "lse", p, arguments.q, *call.lse);
      return p;
    };
    return directly(failure, check, [&](const Problem& p) {
      Backend::run_forward(op, forward_params(p, arguments, call.out, call.lse), arguments, call.out);
    });
  }

  static DirectResult direct_decode(const DirectDecode& call, DirectError& failure) {
    const char* op = "flash_attn_decode";
    const DecodeArguments& arguments = call.arguments;
    auto check = [&] {
      const Problem p = Backend::check_decode(op, arguments);
      check_out(op, "out", p, arguments.q, call.out);
      if (call.lse) check_rows(op, "lse", p, arguments.q, *call.lse);
      return p;
    };
    return directly(failure, check, [&](const Problem& p) {
      Backend::run_decode(op, decode_params(p, arguments, call.out, call.lse), arguments, call.out);
    });
  }

  static DirectResult direct_backward(const DirectBackward& call, DirectError& failure) {
    const char* op = "flash_attn_backward";
    const Arguments& arguments = call.arguments;
    const BackwardTensors& tensors = call.tensors;
    auto check = [&] {
      const Problem p = Backend::check(op, arguments);
      check_saved(op, p, arguments.q, tensors);
      const bool is_in_place =
          Backend::can_read(tensors.dout) && Backend::can_read(tensors.out) && has_contiguous_rows(tensors.lse) &&
          (!tensors.dlse || has_contiguous_rows(*tensors.dlse)) && (!tensors.dsinks || p.sinks != nullptr);
      if (!is_in_place) throw std::runtime_error("a tensor must be copied first");
      return p;
    };
    return directly(failure, check, [&](const Problem& p) {
      Backend::run_backward(op, backward_params(p, arguments, tensors), arguments, tensors);
    });
  }
};

// The operators, with the parameters of arguments_of by value, as torch unboxes them.
template <class Backend, class Signature>
struct Operators;

template <class Backend, class... Rest>
struct Operators<Backend, Arguments(const Tensor&, const Tensor&, const Tensor&, Rest...)> {
  static std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::decay_t<Rest>... rest) {
    const Arguments arguments = arguments_of(q, k, v, rest...);
    return with_torch_errors([&] { return Host<Backend>::forward_of("flash_attn_forward", arguments); });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dout, std::optional<Tensor> dlse, Tensor q,
                                                             Tensor k, Tensor v, Tensor out, Tensor lse,
                                                             std::decay_t<Rest>... rest, bool needs_dq, bool needs_dk,
                                                             bool needs_dv, bool needs_dsinks) {
    const Arguments arguments = arguments_of(q, k, v, rest...);
    const typename Host<Backend>::BackwardInputs inputs{dout,     dlse,     out,      lse,
                                                        needs_dq, needs_dk, needs_dv, needs_dsinks};
    return with_torch_errors([&] { return Host<Backend>::backward_of("flash_attn_backward", arguments, inputs); });
  }
};

// The tensors and numbers of a call on caches, in the order of its schema (flashmla_hf/decode_ops.py).
inline DecodeArguments decode_arguments_of(const Tensor& q, const Tensor& k, const Tensor& v,
                                           const std::optional<Tensor>& sinks,
                                           const std::optional<Tensor>& cache_seqlens,
                                           const std::optional<Tensor>& kv_start,
                                           const std::optional<Tensor>& block_table, double scale, int64_t window_left,
                                           int64_t window_right, double softcap, bool can_split) {
  return {info_of(q),
          info_of(k),
          info_of(v),
          info_of(sinks),
          info_of(cache_seqlens),
          info_of(kv_start),
          info_of(block_table),
          scale,
          window_left,
          window_right,
          softcap,
          can_split};
}

// flash_attn_decode.
template <class Backend>
std::tuple<Tensor, Tensor> decode_operator(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                           std::optional<Tensor> cache_seqlens, std::optional<Tensor> kv_start,
                                           std::optional<Tensor> block_table, double scale, int64_t window_left,
                                           int64_t window_right, double softcap, bool can_split) {
  const DecodeArguments arguments = decode_arguments_of(q, k, v, sinks, cache_seqlens, kv_start, block_table, scale,
                                                        window_left, window_right, softcap, can_split);
  return with_torch_errors([&] { return Host<Backend>::decode_of("flash_attn_decode", arguments); });
}

}  // namespace flashmla

#define FLASHMLA_EXPORT extern "C" __attribute__((visibility("default")))

// The ways in of a backend.
#define FLASHMLA_HOST(Backend, kDispatchKey)                                                            \
  STABLE_TORCH_LIBRARY_IMPL(flashmla, kDispatchKey, m) {                                                \
    m.impl("flash_attn_forward",                                                                        \
           TORCH_BOX((&flashmla::Operators<Backend, decltype(flashmla::arguments_of)>::forward)));      \
    m.impl("flash_attn_backward",                                                                       \
           TORCH_BOX((&flashmla::Operators<Backend, decltype(flashmla::arguments_of)>::backward)));     \
    m.impl("flash_attn_decode", TORCH_BOX((&flashmla::decode_operator<Backend>)));                      \
  }                                                                                                     \
  FLASHMLA_EXPORT uint32_t flashmla_direct_abi() {                                                      \
    return FLASHMLA_DIRECT_ABI;                                                                         \
  }                                                                                                     \
  FLASHMLA_EXPORT flashmla::DirectResult flashmla_direct_forward(const flashmla::DirectForward& call,   \
                                                                 flashmla::DirectError& failure) {      \
    return flashmla::Host<Backend>::direct_forward(call, failure);                                      \
  }                                                                                                     \
  FLASHMLA_EXPORT flashmla::DirectResult flashmla_direct_backward(const flashmla::DirectBackward& call, \
                                                                  flashmla::DirectError& failure) {     \
    return flashmla::Host<Backend>::direct_backward(call, failure);                                     \
  }                                                                                                     \
  FLASHMLA_EXPORT flashmla::DirectResult flashmla_direct_decode(const flashmla::DirectDecode& call,     \
                                                                flashmla::DirectError& failure) {       \
    return flashmla::Host<Backend>::direct_decode(call, failure);                                       \
  }
