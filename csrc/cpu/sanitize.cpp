// Runs every kernel of every instruction set this machine has on odd shapes, for AddressSanitizer and UBSan: `make
// sanitize`.
//
// Every tensor is an allocation of exactly its size (rows spaced by a gap filled with NaN), so a read or write past an
// edge is seen, and a read of the gap turns the result into NaN. Each result is compared with a scalar float64
// computation of the formulas in ../params.h and with a second run on another number of workers, which must agree bit
// for bit. Attention to caches (cache.h) is compared with the forward kernel on copies of the keys. No torch.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "cache.h"

namespace {

using namespace flashmla;

struct Shape {
  std::vector<int> seqlens_q, seqlens_kv;  // one sequence: dense layout; several: packed
  int batch, heads_q, heads_kv, head_dim_qk, head_dim_v, window_left, window_right;
  float softcap;
  bool has_sinks, has_dlse;
};

const Shape kShapes[] = {
    {{1}, {1}, 1, 1, 1, 1, 1, -1, -1, 0.0f, false, false},
    {{5}, {5}, 2, 2, 1, 3, 5, -1, 0, 0.0f, true, true},
    {{33}, {65}, 1, 3, 1, 17, 31, -1, 0, 0.0f, false, true},
    {{100}, {37}, 2, 4, 2, 64, 64, -1, 0, 0.0f, true, false},
    {{1}, {301}, 1, 8, 2, 80, 48, -1, 0, 0.0f, false, false},
    {{129}, {257}, 1, 2, 2, 40, 72, 30, 7, 3.0f, true, true},
    {{131}, {131}, 1, 1, 1, 192, 128, 16, 0, 0.0f, false, false},
    {{70}, {600}, 1, 6, 2, 33, 33, 0, 0, 0.0f, false, true},
    {{200}, {513}, 1, 1, 1, 20, 24, -1, 3, 0.0f, false, false},
    {{40}, {0}, 1, 2, 1, 16, 16, -1, -1, 0.0f, true, true},
    {{0}, {40}, 1, 2, 1, 16, 16, -1, -1, 0.0f, false, false},
    {{17, 0, 130, 1, 5}, {40, 9, 0, 1, 129}, 1, 4, 2, 64, 48, -1, 0, 0.0f, true, true},
    {{3, 97}, {200, 97}, 1, 2, 1, 100, 20, 20, -1, 1.5f, false, false},
};

uint32_t random_state = 1;
float random_number() {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(random_state >> 8) - (1 << 23)) /
         static_cast<float>(1 << 22);  // [-2, 2)
}

uint16_t to_bf16(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t u = static_cast<uint32_t>(x) << 16;
  float y;
  std::memcpy(&y, &u, 4);
  return y;
}
// Numbers with at most 8 significant bits and a small exponent: the same in all three dtypes.
float from_f16(uint16_t x) {
  const int exponent = (x >> 10) & 31, mantissa = x & 1023;
  const float magnitude = exponent == 0    ? std::ldexp(static_cast<float>(mantissa), -24)
                          : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                           : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}
uint16_t to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  int exponent;
  const float mantissa = std::frexp(std::fabs(x), &exponent);  // [0.5, 1)
  if (x == 0.0f || exponent < -13) return sign;
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | (static_cast<int>(mantissa * 2048.0f) & 1023));
}

// [rows, heads, dim] of one dtype with `gap` unused elements between heads.
struct Array {
  DType dtype;
  int64_t rows, heads, dim, gap;
  std::vector<uint8_t> bytes;

  Array(DType dtype_, int64_t rows_, int64_t heads_, int64_t dim_, int64_t gap_, bool is_random)
      : dtype(dtype_), rows(rows_), heads(heads_), dim(dim_), gap(gap_) {
    const int64_t size = rows * heads == 0 ? 0 : (rows * heads - 1) * (dim + gap) + dim;
    bytes.resize(static_cast<size_t>(size * item()));
    for (int64_t i = 0; i < size; ++i) {
      const bool is_gap = i % (dim + gap) >= dim;
      set(i, is_random && !is_gap ? from_bf16(to_bf16(random_number())) : std::numeric_limits<float>::quiet_NaN());
    }
  }
  int64_t item() const { return dtype == DType::kFloat32 ? 4 : 2; }
  void set(int64_t i, float x) {
    const uint16_t half = dtype == DType::kBFloat16 ? (x == x ? to_bf16(x) : 0x7fc0) : (x == x ? to_f16(x) : 0x7e00);
    if (dtype == DType::kFloat32) {
      std::memcpy(&bytes[static_cast<size_t>(i * 4)], &x, 4);
    } else {
      std::memcpy(&bytes[static_cast<size_t>(i * 2)], &half, 2);
    }
  }
  double at(int64_t row, int64_t head, int64_t i) const {
    const size_t index = static_cast<size_t>((row * heads + head) * (dim + gap) + i);
    if (dtype == DType::kFloat32) {
      float x;
      std::memcpy(&x, &bytes[index * 4], 4);
      return x;
    }
    uint16_t x;
    std::memcpy(&x, &bytes[index * 2], 2);
    return dtype == DType::kBFloat16 ? from_bf16(x) : from_f16(x);
  }
  TensorView view(int64_t seqlen, bool is_packed) {
    const int64_t stride = heads * (dim + gap);
    TensorView v;
    v.data = bytes.data();
    v.stride_batch = is_packed ? 0 : seqlen * stride;
    v.stride_seqlen = stride;
    v.stride_heads = dim + gap;
    return v;
  }
};

void run_threads(int64_t num_workers, void (*body)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < num_workers; ++i) threads.emplace_back(body, context, i);
  for (std::thread& thread : threads) thread.join();
}

template <typename Body>
void with_workspace(int64_t bytes, const Body& body) {
  void* data = std::aligned_alloc(64, static_cast<size_t>((bytes + 63) / 64 * 64 + 64));
  std::memset(data, 0xff, static_cast<size_t>(bytes));  // NaN: nothing may rely on what was there
  body(data);
  std::free(data);
}

struct Results {
  Array out, dq, dk, dv;
  std::vector<float> lse, dsinks;
};

int failures = 0;

void compare(const char* what, double got, double expected, double tolerance, const char* isa, DType dtype, int shape) {
  if (std::fabs(got - expected) <= tolerance || (got == expected)) return;
  std::printf("FAIL %s dtype %d shape %d: %s is %g, expected %g\n", isa, static_cast<int>(dtype), shape, what, got,
              expected);
  ++failures;
}

void run_case(const cpu::Kernels& kernels, DType dtype, int shape_index) {
  const Shape& shape = kShapes[shape_index];
  const char* isa = cpu::kIsaNames[static_cast<int>(kernels.isa)];
  const bool is_packed = shape.seqlens_q.size() > 1;
  Problem p;
  p.dtype = dtype;
  std::vector<int32_t> cu_q = {0}, cu_kv = {0};
  const int64_t num_sequences = is_packed ? static_cast<int64_t>(shape.seqlens_q.size()) : shape.batch;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int lq = shape.seqlens_q[static_cast<size_t>(is_packed ? b : 0)],
              lk = shape.seqlens_kv[static_cast<size_t>(is_packed ? b : 0)];
    cu_q.push_back(cu_q.back() + lq);
    cu_kv.push_back(cu_kv.back() + lk);
    p.seqlen_q = lq > p.seqlen_q ? lq : p.seqlen_q;
    p.seqlen_kv = lk > p.seqlen_kv ? lk : p.seqlen_kv;
  }
  p.batch = num_sequences;
  p.total_q = cu_q.back();
  p.total_kv = cu_kv.back();
  p.heads_q = shape.heads_q;
  p.heads_kv = shape.heads_kv;
  p.head_dim_qk = shape.head_dim_qk;
  p.head_dim_v = shape.head_dim_v;
  p.window_left = shape.window_left;
  p.window_right = shape.window_right;
  p.scale = 0.3f;
  p.softcap = shape.softcap;
  std::vector<float> sinks(static_cast<size_t>(p.heads_q));
  for (float& x : sinks) x = random_number();
  if (shape.has_sinks) p.sinks = sinks.data();
  if (is_packed) {
    p.cu_seqlens_q = cu_q.data();
    p.cu_seqlens_kv = cu_kv.data();
  }

  random_state = 7u + static_cast<uint32_t>(shape_index);
  Array q(dtype, p.total_q, p.heads_q, p.head_dim_qk, 3, true),
      k(dtype, p.total_kv, p.heads_kv, p.head_dim_qk, 1, true);
  Array v(dtype, p.total_kv, p.heads_kv, p.head_dim_v, 0, true),
      dout(dtype, p.total_q, p.heads_q, p.head_dim_v, 5, true);
  std::vector<float> dlse(static_cast<size_t>(p.total_q * p.heads_q));
  for (float& x : dlse) x = random_number();

  const auto run = [&](int64_t num_workers) {
    Results r = {Array(dtype, p.total_q, p.heads_q, p.head_dim_v, 0, false),
                 Array(dtype, p.total_q, p.heads_q, p.head_dim_qk, 0, false),
                 Array(dtype, p.total_kv, p.heads_kv, p.head_dim_qk, 0, false),
                 Array(dtype, p.total_kv, p.heads_kv, p.head_dim_v, 0, false),
                 std::vector<float>(static_cast<size_t>(p.total_q * p.heads_q)),
                 std::vector<float>(static_cast<size_t>(p.heads_q))};
    RowView lse, dlse_view;
    lse.data = r.lse.data();
    lse.stride_batch = is_packed ? 0 : p.heads_q * p.seqlen_q;
    lse.stride_heads = is_packed ? p.total_q : p.seqlen_q;
    dlse_view = lse;
    dlse_view.data = dlse.data();
    ForwardParams forward;
    forward.problem = p;
    forward.q = q.view(p.seqlen_q, is_packed);
    forward.k = k.view(p.seqlen_kv, is_packed);
    forward.v = v.view(p.seqlen_kv, is_packed);
    forward.out = r.out.view(p.seqlen_q, is_packed);
    forward.lse = lse;
    BackwardParams backward;
    backward.problem = p;
    backward.q = forward.q;
    backward.k = forward.k;
    backward.v = forward.v;
    backward.out = forward.out;
    backward.dout = dout.view(p.seqlen_q, is_packed);
    backward.lse = lse;
    if (shape.has_dlse) backward.dlse = dlse_view;
    backward.dq = r.dq.view(p.seqlen_q, is_packed);
    backward.dk = r.dk.view(p.seqlen_kv, is_packed);
    backward.dv = r.dv.view(p.seqlen_kv, is_packed);
    if (shape.has_sinks) backward.dsinks = r.dsinks.data();
    const cpu::Entry& entry = cpu::entry_for(kernels, p);
    const cpu::Parallel parallel = {num_workers, run_threads};
    with_workspace(entry.forward_workspace(forward, num_workers),
                   [&](void* data) { entry.forward(forward, data, parallel); });
    with_workspace(entry.backward_workspace(backward, num_workers),
                   [&](void* data) { entry.backward(backward, data, parallel); });
    return r;
  };
  const Results r = run(1), again = run(3);
  if (r.out.bytes != again.out.bytes || r.dq.bytes != again.dq.bytes || r.dk.bytes != again.dk.bytes ||
      r.dv.bytes != again.dv.bytes || r.lse != again.lse || r.dsinks != again.dsinks) {  // no NaN here: compared below
    std::printf("FAIL %s dtype %d shape %d: 1 and 3 workers disagree\n", isa, static_cast<int>(dtype), shape_index);
    ++failures;
  }

  // float64, straight from the formulas.
  const int64_t group = p.heads_q / p.heads_kv;
  std::vector<double> dk(static_cast<size_t>(p.total_kv * p.heads_kv * p.head_dim_qk)),
      dv(static_cast<size_t>(p.total_kv * p.heads_kv * p.head_dim_v));
  std::vector<double> dsinks(static_cast<size_t>(p.heads_q));
  const double unit = dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 4e-3 : 3e-2;
  for (int64_t b = 0; b < num_sequences; ++b) {
    const int64_t lq = cu_q[static_cast<size_t>(b + 1)] - cu_q[static_cast<size_t>(b)],
                  lk = cu_kv[static_cast<size_t>(b + 1)] - cu_kv[static_cast<size_t>(b)];
    for (int64_t h = 0; h < p.heads_q; ++h)
      for (int64_t i = 0; i < lq; ++i) {
        const int64_t row = cu_q[static_cast<size_t>(b)] + i, first_key = cu_kv[static_cast<size_t>(b)], hk = h / group;
        const size_t statistic =
            static_cast<size_t>(is_packed ? h * p.total_q + row : (b * p.heads_q + h) * p.seqlen_q + i);
        std::vector<double> s(static_cast<size_t>(lk)), slope(static_cast<size_t>(lk), 1.0);
        double top = shape.has_sinks ? sinks[static_cast<size_t>(h)] : -INFINITY;
        for (int64_t j = 0; j < lk; ++j) {
          const int64_t position = i + lk - lq;
          double x = 0;
          for (int64_t c = 0; c < p.head_dim_qk; ++c) x += q.at(row, h, c) * k.at(first_key + j, hk, c);
          x *= p.scale;
          if (p.softcap > 0) {
            const double t = std::tanh(x / p.softcap);
            slope[static_cast<size_t>(j)] = 1 - t * t;
            x = p.softcap * t;
          }
          if ((p.window_left >= 0 && j < position - p.window_left) ||
              (p.window_right >= 0 && j > position + p.window_right))
            x = -INFINITY;
          s[static_cast<size_t>(j)] = x;
          top = x > top ? x : top;
        }
        double total = shape.has_sinks ? std::exp(sinks[static_cast<size_t>(h)] - top) : 0.0;
        for (const double x : s) total += x == -INFINITY ? 0.0 : std::exp(x - top);
        const bool is_dead = top == -INFINITY;
        const double lse = is_dead ? -INFINITY : top + std::log(total);
        compare("lse", r.lse[statistic], lse, 1e-5 + (dtype == DType::kBFloat16 ? 1e-5 : 0), isa, dtype, shape_index);
        std::vector<double> probability(static_cast<size_t>(lk)), dp(static_cast<size_t>(lk));
        double delta = shape.has_dlse && !is_dead ? -dlse[statistic] : 0.0;
        for (int64_t j = 0; j < lk; ++j) {
          const size_t key = static_cast<size_t>(j);
          probability[key] = s[key] == -INFINITY ? 0.0 : std::exp(s[key] - lse);
          for (int64_t c = 0; c < p.head_dim_v; ++c) dp[key] += dout.at(row, h, c) * v.at(first_key + j, hk, c);
          delta += probability[key] * dp[key];
        }
        if (shape.has_sinks) dsinks[static_cast<size_t>(h)] -= std::exp(sinks[static_cast<size_t>(h)] - lse) * delta;
        for (int64_t c = 0; c < p.head_dim_v; ++c) {
          double o = 0;
          for (int64_t j = 0; j < lk; ++j) {
            o += probability[static_cast<size_t>(j)] * v.at(first_key + j, hk, c);
            dv[static_cast<size_t>(((first_key + j) * p.heads_kv + hk) * p.head_dim_v + c)] +=
                probability[static_cast<size_t>(j)] * dout.at(row, h, c);
          }
          compare("out", r.out.at(row, h, c), o, unit, isa, dtype, shape_index);
        }
        for (int64_t c = 0; c < p.head_dim_qk; ++c) {
          double dq = 0;
          for (int64_t j = 0; j < lk; ++j) {
            const double ds = p.scale * probability[static_cast<size_t>(j)] * (dp[static_cast<size_t>(j)] - delta) *
                              slope[static_cast<size_t>(j)];
            dq += ds * k.at(first_key + j, hk, c);
            dk[static_cast<size_t>(((first_key + j) * p.heads_kv + hk) * p.head_dim_qk + c)] += ds * q.at(row, h, c);
          }
          compare("dq", r.dq.at(row, h, c), dq, 8 * unit * (1 + std::fabs(dq)), isa, dtype, shape_index);
        }
      }
  }
  for (int64_t j = 0; j < p.total_kv; ++j)
    for (int64_t h = 0; h < p.heads_kv; ++h) {
      for (int64_t c = 0; c < p.head_dim_qk; ++c) {
        const double x = dk[static_cast<size_t>((j * p.heads_kv + h) * p.head_dim_qk + c)];
        compare("dk", r.dk.at(j, h, c), x, 8 * unit * (1 + std::fabs(x)), isa, dtype, shape_index);
      }
      for (int64_t c = 0; c < p.head_dim_v; ++c) {
        const double x = dv[static_cast<size_t>((j * p.heads_kv + h) * p.head_dim_v + c)];
        compare("dv", r.dv.at(j, h, c), x, 8 * unit * (1 + std::fabs(x)), isa, dtype, shape_index);
      }
    }
  if (shape.has_sinks)
    for (size_t h = 0; h < dsinks.size(); ++h)
      compare("dsinks", r.dsinks[h], dsinks[h], 8 * unit * (1 + std::fabs(dsinks[h])), isa, dtype, shape_index);
}

// Sequences in a cache, as pages in disorder or dense (page_size 0); what none of them uses is NaN.
void run_cache_case(const cpu::Kernels& kernels, DType dtype, int64_t page_size, int64_t seqlen_q,
                    int64_t window_left) {
  const std::vector<int32_t> lengths = {37, 0, 1, 100}, starts = {5, 0, 0, 60};
  const int64_t batch = 4, heads_q = 6, heads_kv = 2, d = 40, dv = 24, capacity = page_size > 0 ? 144 : 101;
  const int64_t rows_of_page = page_size > 0 ? page_size : capacity, pages = capacity / rows_of_page;
  random_state = 11;
  Array q(dtype, batch * seqlen_q, heads_q, d, 3, true), k(dtype, batch * capacity, heads_kv, d, 1, false),
      v(dtype, batch * capacity, heads_kv, dv, 0, false);
  std::vector<int32_t> table(static_cast<size_t>(batch * pages));
  for (int64_t i = 0; i < batch * pages; ++i)
    table[static_cast<size_t>(i)] = static_cast<int32_t>(batch * pages - 1 - i);
  const auto row_of = [&](int64_t b, int64_t j) {
    const int64_t page = page_size > 0 ? table[static_cast<size_t>(b * pages + j / rows_of_page)] : b;
    return page * rows_of_page + j % rows_of_page;
  };
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t j = starts[static_cast<size_t>(b)]; j < lengths[static_cast<size_t>(b)]; ++j)
      for (int64_t h = 0; h < heads_kv; ++h) {
        for (int64_t c = 0; c < d; ++c)
          k.set((row_of(b, j) * heads_kv + h) * (d + 1) + c, from_bf16(to_bf16(random_number())));
        for (int64_t c = 0; c < dv; ++c)
          v.set((row_of(b, j) * heads_kv + h) * dv + c, from_bf16(to_bf16(random_number())));
      }

  DecodeParams params;
  Problem& p = params.problem;
  p.dtype = dtype;
  p.batch = batch;
  p.seqlen_q = seqlen_q;
  p.seqlen_kv = capacity;
  p.total_q = batch * seqlen_q;
  p.total_kv = batch * capacity;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.head_dim_qk = d;
  p.head_dim_v = dv;
  p.window_left = window_left;
  p.window_right = 0;
  p.scale = 0.3f;
  params.q = q.view(seqlen_q, false);
  params.k = k.view(rows_of_page, false);
  params.v = v.view(rows_of_page, false);
  params.cache_seqlens = lengths.data();
  params.kv_start = starts.data();
  params.block_table = page_size > 0 ? table.data() : nullptr;
  params.stride_block_table = pages;
  params.num_pages = batch * pages;
  params.page_size = rows_of_page;
  const cpu::Entry& entry = cpu::entry_for(kernels, p);
  const auto fail_case = [&](const char* what, int64_t number) {
    std::printf("FAIL %s dtype %d pages of %d, %d queries, window %d: %s %d\n",
                cpu::kIsaNames[static_cast<int>(kernels.isa)], static_cast<int>(dtype), static_cast<int>(page_size),
                static_cast<int>(seqlen_q), static_cast<int>(window_left), what, static_cast<int>(number));
    ++failures;
  };

  std::vector<uint8_t> first;
  for (const int64_t num_workers : {1, 3, 12}) {  // 12: more than there are kv heads in the batch
    Array out(dtype, batch * seqlen_q, heads_q, dv, 0, false);
    params.out = out.view(seqlen_q, false);
    const cpu::Parallel parallel = {num_workers, run_threads};
    cpu::CacheAttention attention(params, entry, num_workers);
    with_workspace(attention.workspace(), [&](void* data) { attention.run(data, parallel); });
    if (num_workers > 1) {
      if (out.bytes != first) fail_case("another result with workers", num_workers);
      continue;
    }
    first = out.bytes;
    for (int64_t b = 0; b < batch; ++b) {
      const int64_t start = starts[static_cast<size_t>(b)], length = lengths[static_cast<size_t>(b)] - start;
      Array copy_k(dtype, length, heads_kv, d, 0, false), copy_v(dtype, length, heads_kv, dv, 0, false),
          expected(dtype, seqlen_q, heads_q, dv, 0, false);
      for (int64_t j = 0; j < length; ++j)
        for (int64_t h = 0; h < heads_kv; ++h) {
          for (int64_t c = 0; c < d; ++c)
            copy_k.set((j * heads_kv + h) * d + c, static_cast<float>(k.at(row_of(b, start + j), h, c)));
          for (int64_t c = 0; c < dv; ++c)
            copy_v.set((j * heads_kv + h) * dv + c, static_cast<float>(v.at(row_of(b, start + j), h, c)));
        }
      ForwardParams forward;
      forward.problem = p;
      forward.problem.batch = 1;
      forward.problem.seqlen_kv = forward.problem.total_kv = length;
      forward.problem.total_q = seqlen_q;
      forward.q = params.q;
      forward.q.data = static_cast<uint8_t*>(params.q.data) + b * params.q.stride_batch * q.item();
      forward.k = copy_k.view(length, false);
      forward.v = copy_v.view(length, false);
      forward.out = expected.view(seqlen_q, false);
      with_workspace(entry.forward_workspace(forward, 1),
                     [&](void* data) { entry.forward(forward, data, {1, run_threads}); });
      const double unit = dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kFloat16 ? 4e-3 : 3e-2;
      for (int64_t i = 0; i < seqlen_q; ++i)
        for (int64_t h = 0; h < heads_q; ++h)
          for (int64_t c = 0; c < dv; ++c)
            if (!(std::fabs(out.at(b * seqlen_q + i, h, c) - expected.at(i, h, c)) <= unit))
              return fail_case("another result for sequence", b);
    }
  }
}

}  // namespace

int main() {
  for (int isa = 0; isa <= static_cast<int>(cpu::detect_isa()); ++isa) {
    const cpu::Kernels kernels = cpu::kernels_for(static_cast<cpu::Isa>(isa));
    int cases = 0;
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (int shape = 0; shape < static_cast<int>(sizeof(kShapes) / sizeof(kShapes[0])); ++shape, ++cases)
        run_case(kernels, dtype, shape);
    for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16})
      for (const int64_t page_size : {0, 16, 48})
        for (const int64_t seqlen_q : {1, 5, 45})
          for (const int64_t window_left : {-1, 20}) {
            run_cache_case(kernels, dtype, page_size, seqlen_q, window_left);
            ++cases;
          }
    std::printf("%-12s %d cases\n", cpu::kIsaNames[isa], cases);
  }
  std::printf(failures ? "%d failures\n" : "no failures\n", failures);
  return failures != 0;
}
