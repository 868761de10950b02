// The Hopper backend's host side: checks, allocates, fills params and launches on the current stream.
//
// Registers flash_attn_forward, flash_attn_backward, flash_attn_decode and append_to_cache (defined in flashmla_hf/
// ops.py and decode_ops.py) for CUDA, through torch's stable ABI. Nothing here waits for the device: the values of
// cu_seqlens are not read back; the kernels clamp them to the tensors.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "host.h"
#include "sm90/decode/append.h"
#include "sm90/hopper/device.h"
#include "sm90/launch.h"
#include "sm90/tiles.h"

// Of libtorch_cuda; the stable headers declare it only where torch was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flashmla {
namespace {

constexpr int64_t kLargestLength = int64_t{1} << 28;  // key positions are 32-bit numbers with room for windows

// TMA reads 16 bytes at a time from addresses and strides that are multiples of 16 bytes.
bool has_aligned_data(const TensorInfo& t) {
  return t.numel() == 0 || reinterpret_cast<uintptr_t>(t.data) % 16 == 0;
}

// The dimension whose stride TMA cannot read, or -1.
int64_t unaligned_dimension(const TensorInfo& t) {
  for (int64_t i = 0; t.numel() > 0 && i + 1 < t.dim; ++i)
    if (t.size(i) > 1 && (t.stride(i) * element_size(t.dtype) % 16 != 0 || t.stride(i) == 0)) return i;
  return -1;
}

void check_alignment(const char* op, const char* name, const TensorInfo& t) {
  if (!has_aligned_data(t)) fail(op, name, "a data pointer aligned to 16 bytes (call .clone())", "one that is not");
  if (const int64_t i = unaligned_dimension(t); i >= 0)
    fail(op, name,
         "strides that are positive multiples of " + std::to_string(16 / element_size(t.dtype)) +
             " elements (call .contiguous())",
         "stride " + std::to_string(t.stride(i)) + " in dimension " + std::to_string(i));
}

cudaStream_t current_stream(const TensorInfo& t) {
  void* stream = nullptr;
  expect_success(aoti_torch_get_current_cuda_stream(t.device_index, &stream), "aoti_torch_get_current_cuda_stream");
  return static_cast<cudaStream_t>(stream);
}

// Asked once a device: the two queries take as long as the rest of a call's checks.
void check_device(const char* op, const char* name, const TensorInfo& t) {
  if (t.device_type != aoti_torch_device_type_cuda())
    fail(op, name, "a tensor on a Hopper GPU", "one on another device");
  constexpr int kMaxDevices = 64;
  static std::atomic<int> cache[kMaxDevices];  // 10 * major + minor
  const int device = t.device_index;
  int capability = device < kMaxDevices ? cache[device].load() : 0;
  if (capability == 0) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    capability = 10 * major + minor;
    if (device < kMaxDevices) cache[device] = capability;
  }
  if (capability != 90)
    fail(op, name, "a tensor on a Hopper GPU (compute capability 9.0)",
         "compute capability " + std::to_string(capability / 10) + "." + std::to_string(capability % 10));
}

// dtypes, head dims, addresses, strides and lengths that no kernel takes.
template <class Call>
void check_kernel_limits(const char* op, const Call& arguments, const Problem& p,
                         int64_t largest_qk = sm90::kLargestHeadDim, int64_t largest_v = sm90::kLargestHeadDim,
                         int64_t multiple = sm90::kHeadDimMultiple) {
  if (p.dtype == DType::kFloat32) fail(op, "q", "dtype float16 or bfloat16", "float32");
  const std::tuple<const char*, int64_t, int64_t> head_dims[] = {{"q", p.head_dim_qk, largest_qk},
                                                                 {"v", p.head_dim_v, largest_v}};
  for (const auto& [name, head_dim, largest] : head_dims)
    if (head_dim % multiple != 0 || head_dim > largest)
      fail(op, name,
           "a head dimension that is a multiple of " + std::to_string(multiple) + " up to " + std::to_string(largest),
           head_dim);
  const std::pair<const char*, const TensorInfo*> inputs[] = {
      {"q", &arguments.q}, {"k", &arguments.k}, {"v", &arguments.v}};
  for (const auto& [name, t] : inputs) {
    check_alignment(op, name, *t);
    if (t->size(t->dim - 3) >= kLargestLength)
      fail(op, name, "fewer than 2^28 rows", "shape " + shape_name(t->shape()));
  }
  if (p.seqlen_kv >= kLargestLength) fail(op, "k", "room for fewer than 2^28 keys a sequence", p.seqlen_kv);
}

// Whether v is the first columns of k's rows: the decode kernel of latents reads them once.
bool are_latents(const TensorInfo& k, const TensorInfo& v) {
  bool is_view = k.data == v.data && v.size(3) <= k.size(3);
  for (int64_t i = 0; i < 3; ++i) is_view = is_view && k.stride(i) == v.stride(i);
  return is_view;
}

struct Sm90 {
  static Problem check(const char* op, const Arguments& arguments) {
    return check_up_to(op, arguments, sm90::kLargestHeadDim);
  }

  static Problem check_up_to(const char* op, const Arguments& arguments, int64_t largest_head_dim,
                             bool is_e4m3 = false) {
    check_device(op, "q", arguments.q);
    Problem p = check_inputs(op, arguments, is_e4m3);
    check_kernel_limits(op, arguments, p, largest_head_dim, largest_head_dim,
                        is_e4m3 ? sm90::kE4m3HeadDimMultiple : sm90::kHeadDimMultiple);
    if (p.cu_seqlens_q != nullptr) {
      check_flag_number(op, "max_seqlen_q", arguments.max_seqlen_q, 0);
      check_flag_number(op, "max_seqlen_kv", arguments.max_seqlen_kv, 0);
      // Windows are judged by what the sequences could be, not by bounds that nobody checks.
      p.seqlen_q = p.total_q;
      p.seqlen_kv = p.total_kv;
    }
    check_scalars(op, arguments, p);
    if (p.cu_seqlens_q != nullptr) p.seqlen_q = std::min(arguments.max_seqlen_q, p.total_q);  // a hint how to tile
    p.deterministic = arguments.deterministic;
    return p;
  }

  // What autograd hands back lies as it likes: expanded, sliced, transposed.
  static bool can_read(const TensorInfo& t) { return unaligned_dimension(t) < 0 && has_aligned_data(t); }
  static Tensor make_readable(const Tensor& t) {
    const TensorInfo info = info_of(t);
    return can_read(info) ? t : make_copy(info, t);
  }

  static void run_forward(const char* op, const ForwardParams& params, const Arguments& arguments,
                          const TensorInfo& out) {
    if (out.numel() == 0) return;
    launch(op, arguments.q, sm90::forward_workspace, sm90::launch_forward, params);
  }

  static Problem check_decode(const char* op, const DecodeArguments& arguments) {
    check_device(op, "q", arguments.q);
    const Problem p = check_decode_inputs(op, arguments);
    if (are_latents(arguments.k, arguments.v)) {
      using Largest = sm90::LatentHeadDims;
      check_kernel_limits(op, arguments, p, Largest::kHeadDimQK, Largest::kHeadDimV);
    } else {
      check_kernel_limits(op, arguments, p, sm90::kLargestDecodeHeadDim, sm90::kLargestDecodeHeadDim);
    }
    return p;
  }

  static void run_decode(const char* op, const DecodeParams& params, const DecodeArguments& arguments,
                         const TensorInfo& out) {
    if (out.numel() == 0) return;
    launch(op, arguments.q, sm90::decode_workspace, sm90::launch_decode, params);
  }

  static void run_backward(const char* op, const BackwardParams& params, const Arguments& arguments,
                           const BackwardTensors&) {
    launch(op, arguments.q, sm90::backward_workspace, sm90::launch_backward, params);
  }

  template <class Params>
  static void launch(const char* op, const TensorInfo& q, int64_t (*workspace_bytes)(Params const&),
                     const char* (*launch_kernels)(Params const&, void*, cudaStream_t), const Params& params) {
    on_device(op, q, [&](cudaStream_t stream) {
      const Tensor workspace = make_tensor(q, {workspace_bytes(params)}, ScalarType::Byte);
      return launch_kernels(params, workspace.mutable_data_ptr(), stream);
    });
  }

  // run(stream) returns null, or a sentence that says what went wrong.
  template <class Run>
  static void on_device(const char* op, const TensorInfo& t, const Run& run) {
    const torch::stable::accelerator::DeviceGuard guard(t.device_index);
    if (const cudaError_t status = sm90::bind_thread(t.device_index); status != cudaSuccess)
      throw std::runtime_error(std::string(op) + ": cudaSetDevice(" + std::to_string(t.device_index) +
                               "): " + cudaGetErrorString(status));
    const char* error = run(current_stream(t));
    if (error != nullptr) throw std::runtime_error(std::string(op) + ": " + error);
  }
};

// flash_attn_fp8_forward, flash_attn_fp8_round and flash_attn_e4m3_forward, which this backend alone has
// (flashmla_hf/fp8/kernel.py defines them).
struct Sm90Fp8 : Sm90 {
  static Problem check(const char* op, const Arguments& arguments) {
    return check_up_to(op, arguments, sm90::kLargestFp8HeadDim);
  }

  static void run_forward(const char* op, const ForwardParams& params, const Arguments& arguments,
                          const TensorInfo& out) {
    if (out.numel() == 0) return;
    launch(op, arguments.q, sm90::fp8_forward_workspace, sm90::launch_fp8_forward,
           Fp8ForwardParams{params, true, {}, {}, {}});
  }

  static std::tuple<Tensor, Tensor, Tensor> round(const char* op, const Arguments& arguments) {
    const Problem p = check(op, arguments);
    auto make_like = [](const TensorInfo& x) { return make_tensor(x, x.shape(), ScalarType::BFloat16); };
    const Tensor q = make_like(arguments.q), k = make_like(arguments.k), v = make_like(arguments.v);
    Fp8RoundingParams params{};
    static_cast<ForwardParams&>(params) = forward_params(p, arguments, arguments.q, std::nullopt);
    params.out = TensorView{};
    params.rotates = true;
    params.rounded_q = q.mutable_data_ptr();
    params.rounded_k = k.mutable_data_ptr();
    params.rounded_v = v.mutable_data_ptr();
    on_device(op, arguments.q, [&](cudaStream_t stream) { return sm90::launch_fp8_rounding(params, stream); });
    return {q, k, v};
  }
};

// flash_attn_e4m3_forward: tensors that are e4m3, with a factor for each sequence and kv head.
struct E4m3Arguments : Arguments {
  TensorInfo q_descale, k_descale, v_descale;
};

struct Sm90E4m3 {
  static Problem check(const char* op, const E4m3Arguments& arguments) {
    const Problem p = Sm90::check_up_to(op, arguments, sm90::kLargestFp8HeadDim, true);
    check_dtype(op, "q", arguments.q, ScalarType::Float8_e4m3fn, "");
    const std::pair<const char*, const TensorInfo*> factors[] = {
        {"q_descale", &arguments.q_descale}, {"k_descale", &arguments.k_descale}, {"v_descale", &arguments.v_descale}};
    for (const auto& [name, t] : factors)
      check_factors(op, name, *t, arguments.q, {p.batch, p.heads_kv}, "sequences, kv heads");
    return p;
  }

  static void run_forward(const char* op, const ForwardParams& params, const E4m3Arguments& arguments,
                          const TensorInfo& out) {
    if (out.numel() == 0) return;
    auto factors_of = [](const TensorInfo& t) {
      return ScaleView{static_cast<const float*>(t.data), t.stride(0), 0, t.stride(1)};
    };
    Sm90::launch(op, arguments.q, sm90::fp8_forward_workspace, sm90::launch_fp8_forward,
                 Fp8ForwardParams{params, false, factors_of(arguments.q_descale), factors_of(arguments.k_descale),
                                  factors_of(arguments.v_descale)});
  }
};

// flash_attn_decode_e4m3, which this backend alone has (flashmla_hf/fp8/cached.py defines it).
struct Sm90E4m3Cache {
  static Problem check_decode(const char* op, const E4m3DecodeArguments& arguments) {
    check_device(op, "q", arguments.q);
    const Problem p = check_decode_inputs(op, arguments);
    check_kernel_limits(op, arguments, p, sm90::kLargestE4m3DecodeHeadDim, sm90::kLargestE4m3DecodeHeadDim,
                        sm90::kE4m3HeadDimMultiple);
    return p;
  }

  static void run_decode(const char* op, const E4m3DecodeParams& params, const E4m3DecodeArguments& arguments,
                         const TensorInfo& out) {
    if (out.numel() == 0) return;
    Sm90::launch(op, arguments.q, sm90::e4m3_decode_workspace, sm90::launch_e4m3_decode, params);
  }
};

std::tuple<Tensor, Tensor> decode_e4m3_operator(Tensor q, Tensor k, Tensor v, Tensor k_descale, Tensor v_descale,
                                                std::optional<Tensor> sinks, std::optional<Tensor> cache_seqlens,
                                                std::optional<Tensor> kv_start, std::optional<Tensor> block_table,
                                                double scale, int64_t window_left, int64_t window_right, double softcap,
                                                bool can_split) {
  const E4m3DecodeArguments arguments{decode_arguments_of(q, k, v, sinks, cache_seqlens, kv_start, block_table, scale,
                                                          window_left, window_right, softcap, can_split),
                                      info_of(k_descale), info_of(v_descale)};
  return with_torch_errors([&] { return Host<Sm90E4m3Cache>::decode_of("flash_attn_decode_e4m3", arguments); });
}

std::tuple<Tensor, Tensor> fp8_forward_operator(Tensor q, Tensor k, Tensor v, std::optional<Tensor> sinks,
                                                std::optional<Tensor> cu_seqlens_q, std::optional<Tensor> cu_seqlens_kv,
                                                int64_t max_seqlen_q, int64_t max_seqlen_kv, double scale,
                                                int64_t window_left, int64_t window_right, double softcap,
                                                bool deterministic) {
  const Arguments arguments = arguments_of(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv,
                                           scale, window_left, window_right, softcap, deterministic);
  return with_torch_errors([&] { return Host<Sm90Fp8>::forward_of("flash_attn_fp8_forward", arguments); });
}

std::tuple<Tensor, Tensor> e4m3_forward_operator(Tensor q, Tensor k, Tensor v, Tensor q_descale, Tensor k_descale,
                                                 Tensor v_descale, std::optional<Tensor> sinks,
                                                 std::optional<Tensor> cu_seqlens_q,
                                                 std::optional<Tensor> cu_seqlens_kv, int64_t max_seqlen_q,
                                                 int64_t max_seqlen_kv, double scale, int64_t window_left,
                                                 int64_t window_right, double softcap, bool deterministic) {
  const E4m3Arguments arguments{arguments_of(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, max_seqlen_q, max_seqlen_kv,
                                             scale, window_left, window_right, softcap, deterministic),
                                info_of(q_descale), info_of(k_descale), info_of(v_descale)};
  return with_torch_errors([&] { return Host<Sm90E4m3>::forward_of("flash_attn_e4m3_forward", arguments); });
}

// append_to_cache, which this backend alone has (flashmla_hf/decode_ops.py defines it).
struct AppendArguments {
  TensorInfo k_cache, k, cache_seqlens;
  std::optional<TensorInfo> v_cache, v, block_table, k_descale, v_descale;
};

void check_rows_of_heads(const char* op, const char* name, const TensorInfo& t, const TensorInfo& like,
                         const char* whose, std::initializer_list<int64_t> shape, const char* meaning) {
  check_same_device(op, name, t, like);
  check_dtype(op, name, t, like.dtype, whose);
  check_shape(op, name, t, shape, meaning);
  check_last_stride(op, name, t);
  check_storage(op, name, t);
}

sm90::AppendParams check_append(const char* op, const AppendArguments& arguments) {
  const TensorInfo &cache = arguments.k_cache, &k = arguments.k;
  const bool is_e4m3 = cache.dtype == ScalarType::Float8_e4m3fn;
  const TensorInfo& rows = is_e4m3 ? k : cache;  // whose dtype new rows have
  const char* const whose = is_e4m3 ? " (that of k)" : " (that of k_cache)";
  check_device(op, "k_cache", cache);
  if (rows.dtype != ScalarType::Half && rows.dtype != ScalarType::BFloat16) {
    if (is_e4m3) fail(op, "k", "dtype float16 or bfloat16", dtype_name(k.dtype));
    fail(op, "k_cache", "dtype float16, bfloat16 or float8_e4m3fn", dtype_name(cache.dtype));
  }
  if (cache.dim != 4)
    fail(op, "k_cache", "4 dimensions, [pages or batch, rows, heads, dim]", "shape " + shape_name(cache.shape()));
  if (k.dim != 4) fail(op, "k", "4 dimensions, [batch, seqlen_new, heads, dim]", "shape " + shape_name(k.shape()));
  if (arguments.v_cache.has_value() != arguments.v.has_value())
    fail(op, "v", "a tensor if v_cache is one, else None", arguments.v ? "a tensor" : "None");

  sm90::AppendParams params;
  params.batch = k.size(0);
  params.seqlen_new = k.size(1);
  params.heads = cache.size(2);
  params.head_dim_k = cache.size(3);
  params.num_pages = cache.size(0);
  params.page_size = cache.size(1);
  check_rows_of_heads(op, "k_cache", cache, cache, "", {cache.size(0), cache.size(1), cache.size(2), cache.size(3)},
                      "");
  check_rows_of_heads(op, "k", k, rows, whose, {k.size(0), k.size(1), cache.size(2), cache.size(3)},
                      "heads and dim of k_cache");
  params.new_k = view_of(k, false);
  params.k = view_of(cache, false);
  if (arguments.v) {
    const TensorInfo &v_cache = *arguments.v_cache, &v = *arguments.v;
    if (v_cache.dim == 4) params.head_dim_v = v_cache.size(3);
    check_rows_of_heads(op, "v_cache", v_cache, cache, " (that of k_cache)",
                        {cache.size(0), cache.size(1), cache.size(2), params.head_dim_v},
                        "that of k_cache but for dim");
    check_rows_of_heads(op, "v", v, rows, whose, {k.size(0), k.size(1), cache.size(2), params.head_dim_v},
                        "that of k but for dim, which is v_cache's");
    params.new_v = view_of(v, false);
    params.v = view_of(v_cache, false);
  }
  const std::pair<const char*, const std::optional<TensorInfo>*> factors[] = {{"k_descale", &arguments.k_descale},
                                                                              {"v_descale", &arguments.v_descale}};
  for (const auto& [name, t] : factors) {
    if (t->has_value() != is_e4m3)
      fail(op, name, is_e4m3 ? "a tensor, since k_cache is float8_e4m3fn" : "None, since k_cache is not float8_e4m3fn",
           is_e4m3 ? "None" : "a tensor");
    if (is_e4m3) check_row_factors(op, name, **t, cache);
  }
  if (is_e4m3) {
    if (!arguments.v) fail(op, "v", "a tensor, since k_cache is float8_e4m3fn", "None");
    auto scales_of = [](const TensorInfo& t) { return TensorView{t.data, t.stride(0), t.stride(1), t.stride(2)}; };
    params.k_scale = scales_of(*arguments.k_descale);
    params.v_scale = scales_of(*arguments.v_descale);
    params.dtype = k.dtype == ScalarType::Half ? DType::kFloat16 : DType::kBFloat16;
  }
  if (arguments.block_table) {
    check_block_table(op, *arguments.block_table, k);
    if (params.page_size < 1) fail(op, "k_cache", "pages of at least one row", params.page_size);
    params.block_table = static_cast<const int32_t*>(arguments.block_table->data);
    params.stride_block_table = arguments.block_table->stride(0);
    params.capacity = arguments.block_table->size(1) * params.page_size;
  } else {
    if (cache.size(0) != k.size(0))
      fail(op, "k_cache", std::to_string(k.size(0)) + " sequences (batch of k)", cache.size(0));
    params.capacity = params.page_size;
  }
  check_numbers_of_sequences(op, "cache_seqlens", arguments.cache_seqlens, k);
  params.cache_seqlens = static_cast<const int32_t*>(arguments.cache_seqlens.data);
  return params;
}

Tensor append_operator(Tensor k_cache, std::optional<Tensor> v_cache, Tensor k, std::optional<Tensor> v,
                       Tensor cache_seqlens, std::optional<Tensor> block_table, std::optional<Tensor> k_descale,
                       std::optional<Tensor> v_descale) {
  const char* op = "append_to_cache";
  const AppendArguments arguments{info_of(k_cache), info_of(k),           info_of(cache_seqlens), info_of(v_cache),
                                  info_of(v),       info_of(block_table), info_of(k_descale),     info_of(v_descale)};
  sm90::AppendParams params = check_append(op, arguments);
  return with_torch_errors([&] {
    const Tensor lengths = make_tensor(arguments.k, {params.batch}, ScalarType::Int);
    params.lengths = static_cast<int32_t*>(lengths.mutable_data_ptr());
    Sm90::on_device(op, arguments.k, [&](cudaStream_t stream) { return sm90::launch_append(params, stream); });
    return lengths;
  });
}

std::tuple<Tensor, Tensor, Tensor> fp8_round_operator(Tensor q, Tensor k, Tensor v, std::optional<Tensor> cu_seqlens_q,
                                                      std::optional<Tensor> cu_seqlens_kv) {
  const Arguments arguments =
      arguments_of(q, k, v, std::nullopt, cu_seqlens_q, cu_seqlens_kv, 0, 0, 1.0, -1, -1, 0.0, false);
  return with_torch_errors([&] { return Sm90Fp8::round("flash_attn_fp8_round", arguments); });
}

}  // namespace
}  // namespace flashmla

FLASHMLA_HOST(flashmla::Sm90, CUDA)

STABLE_TORCH_LIBRARY_IMPL(flashmla, CUDA, append) {
  append.impl("append_to_cache", TORCH_BOX((&flashmla::append_operator)));
}

STABLE_TORCH_LIBRARY_IMPL(flashmla, CUDA, fp8) {
  fp8.impl("flash_attn_decode_e4m3", TORCH_BOX((&flashmla::decode_e4m3_operator)));
  fp8.impl("flash_attn_e4m3_forward", TORCH_BOX((&flashmla::e4m3_forward_operator)));
  fp8.impl("flash_attn_fp8_forward", TORCH_BOX((&flashmla::fp8_forward_operator)));
  fp8.impl("flash_attn_fp8_round", TORCH_BOX((&flashmla::fp8_round_operator)));
}
