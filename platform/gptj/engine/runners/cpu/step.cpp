// One step of GPT-J over a paged KV cache, on its own threads. A C interface, which library.py calls
// without the GIL, so that the event loop is never blocked.
//
// A step is one parallel run. Threads take work items from shared counters, so that a descheduled
// thread does not delay the others, and meet at a barrier after each part.
//
// A page holds 16 positions of a layer, in words of one fp32 or two bf16: for each head the keys as
// (words of the head, 16), one vector for one word of all positions, and the values as (words of the
// positions, head).

#include "kernels.h"

#include <sys/mman.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <sched.h>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kPage = 16;    // positions per page
// Queries of a sequence that share one pass over keys and values (or fewer, where fewer are left), and
// sums of their scores and values at a time: as many as registers allow.
#ifdef GPTJ_AVX512
constexpr int kQueries = 12, kMoreQueries = 8, kScores = 8, kValues = 24;
#else
constexpr int kQueries = 6, kMoreQueries = 5, kScores = 6, kValues = 6;
#endif
constexpr int64_t kMaxRank = 64;  // of an adapter
constexpr int64_t kRanks = 8;     // rows of an adapter's A per work item

thread_local int thread_number = 0;  // in its pool; the caller is 0

// Threads that run one function together. They sleep between runs; at barriers they spin briefly,
// then yield.
class ThreadPool {
 public:
  explicit ThreadPool(int size) : size_(size) {
    for (int i = 1; i < size; ++i) threads_.emplace_back([this, i] {
        thread_number = i;
        work();
      });
  }

  ~ThreadPool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ended_ = true;
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  void run(const std::function<void()>& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      ++run_;
    }
    wake_.notify_all();
    job();
    barrier();
  }

  void barrier() {
    const int64_t turn = turn_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
      arrived_.store(0, std::memory_order_relaxed);
      turn_.fetch_add(1, std::memory_order_release);
      return;
    }
    for (int spins = 0; turn_.load(std::memory_order_acquire) == turn; ++spins)
      spins < 4000 ? _mm_pause() : (void)sched_yield();
  }

 private:
  void work() {
    for (int64_t seen = 0;;) {
      const std::function<void()>* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return ended_ || run_ != seen; });
        if (ended_) return;
        seen = run_;
        job = job_;
      }
      (*job)();
      barrier();
    }
  }

  const int size_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  const std::function<void()>* job_ = nullptr;
  int64_t run_ = 0;
  bool ended_ = false;
  std::atomic<int> arrived_{0};
  std::atomic<int64_t> turn_{0};
};

}  // namespace

extern "C" {

struct Sizes {
  int64_t kind;  // of the cache and the embedding: fp32 or bf16
  int64_t layers, width, heads, head, rotated, inner, vocabulary, pages, threads;
  float epsilon;
};

// Pointers into tensors that Python keeps. Norms and biases are fp32.
struct Layer {
  const float *norm_weight, *norm_bias;
  Weights qkv, fc_in, out;  // out: (width, width + inner), out_proj beside fc_out
};

// Two matrices of an adapter beside a linear layer's, fp32; rank 0 if the layer has none.
struct LoraPair {
  const float* a;  // (rank, inputs)
  const float* b;  // (columns / 16, rank, 16), scaled
  int64_t rank;
};

struct LoraLayer {
  LoraPair pairs[6];  // q_proj, k_proj, v_proj, fc_in, out_proj, fc_out
};

struct Model {
  const void* embedding;           // (vocabulary, width)
  const float *final_weight, *final_bias;
  Weights head;                    // without data: a step returns hidden states instead of logits
  const float *sines, *cosines;    // (positions, rotated): of each pair -sine, sine; cosine, cosine
  void *keys, *values;             // (layers, pages, heads, 16 * head)
  const Layer* layers;
};

struct Step {
  const int32_t *ids, *positions;  // (tokens)
  const int32_t* query_start_loc;  // (sequences + 1)
  const int32_t* page_table;       // (sequences, pages_per_row)
  const int32_t* logits_indices;   // (num_logits)
  int64_t tokens, sequences, pages_per_row, num_logits;
  float* logits;                   // (num_logits, vocabulary); hidden states: (num_logits, width)
  const LoraLayer* const* adapters;  // (tokens): each one's layers, or null; null if none has any
};
}

namespace {

// Of a layer's pairs.
enum Pair : int { kQuery, kKey, kValue, kFcIn, kOutProj, kFcOut, kPairs };

class Runner {
 public:
  Runner(const Sizes& sizes, const Model& model)
      : s_(sizes),
        m_(model),
        layers_(model.layers, model.layers + sizes.layers),
        kind_(Kind(sizes.kind)),
        pool_(int(sizes.threads)) {
    m_.layers = layers_.data();
  }

  void step(const Step& step) {
    b_ = &step;
    const int64_t most = std::max(step.tokens, step.num_logits);
    const int64_t inputs = s_.width + s_.inner;
    fit(x_, step.tokens * s_.width);
    fit(qkv_, step.tokens * 3 * s_.width);
    fit(branches_, step.tokens * inputs);
    int64_t words = 0, groups = 0;
    for (const Activations& each : {activations(m_.head, most), activations(layers_[0].out, most)}) {
      words = std::max(words, each.words);
      groups = std::max(groups, each.groups);
    }
    fit(by_row_, most * words);
    fit(turned_, most * words);
    fit(scales_, most * groups);
    fit(sums_, most * groups);
    if (step.adapters != nullptr) {
      fit(normed_, step.tokens * s_.width);
      fit(small_, step.tokens * kPairs * kMaxRank);
    }
    counters_ = std::vector<Counter>(size_t((9 * s_.layers + 5) * s_.threads));
    const std::function<void()> job = [this] { run(); };
    pool_.run(job);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
    Counter() = default;
    Counter(const Counter&) {}
    Counter& operator=(const Counter&) { return *this; }
  };

  template <class T>
  static void fit(std::vector<T>& buffer, int64_t size) {
    if (int64_t(buffer.size()) < size) buffer.resize(size_t(size));
  }

  // One thread's share of the step. All threads go through the same parts in the same order.
  void run() {
    int part = 0;
    each(part, b_->tokens, [&](int64_t t) { embed(t); });
    for (int64_t l = 0; l < s_.layers; ++l) {
      const Layer& layer = layers_[size_t(l)];
      const Activations normed = activations(layer.qkv, b_->tokens);
      each(part, b_->tokens, [&](int64_t t) {
        float* kept = adapter(t) != nullptr ? &normed_[size_t(t * s_.width)] : nullptr;
        norm(layer.qkv, normed, t, &x_[size_t(t * s_.width)], layer.norm_weight, layer.norm_bias,
             kept);
      });
      shrink(part, l, kQuery, kFcIn);
      first_product(part, l, normed);
      each(part, b_->sequences * s_.heads,
           [&](int64_t i) { attend(l, i / s_.heads, i % s_.heads); });
      const int64_t inputs = s_.width + s_.inner;
      const Activations branches = activations(layer.out, b_->tokens);
      each(part, b_->tokens, [&](int64_t t) {
        convert(Kind(layer.out.kind), &branches_[size_t(t * inputs)], inputs, branches, t);
      });
      shrink(part, l, kOutProj, kFcOut);
      second_product(part, l, branches);
    }
    if (m_.head.data == nullptr) {
      each(part, b_->num_logits, [&](int64_t i) {
        layer_norm(&x_[size_t(b_->logits_indices[i] * s_.width)], m_.final_weight, m_.final_bias,
                   s_.epsilon, s_.width, b_->logits + i * s_.width);
      });
      return;
    }
    const Activations last = activations(m_.head, b_->num_logits);
    each(part, b_->num_logits, [&](int64_t i) {
      norm(m_.head, last, i, &x_[size_t(b_->logits_indices[i] * s_.width)], m_.final_weight,
           m_.final_bias, nullptr);
    });
    multiply(part, m_.head, last,
             [&](int64_t row, int64_t column, Floats y, Mask mask) {
               store(b_->logits + row * s_.vocabulary + column, mask, y);
             });
  }

  // Distributes `count` work items; returns when all are done. Each thread has its own range, in
  // memory order, and then helps the others.
  template <class Work>
  void each(int& part, int64_t count, const Work& work) {
    const int64_t threads = s_.threads;
    Counter* stretches = &counters_[size_t(part++ * threads)];
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t stretch = (thread_number + i) % threads;
      const int64_t start = count * stretch / threads, end = count * (stretch + 1) / threads;
      auto& taken = stretches[stretch].next;
      for (int64_t k; (k = start + taken.fetch_add(1, std::memory_order_relaxed)) < end;) work(k);
    }
    pool_.barrier();
  }

  template <class Done>
  void multiply(int& part, const Weights& w, const Activations& a, const Done& done) {
    multiply2(part, w, w, 0, a, done, done);
  }

  // Two products of one kind with the same activations in one part; `more` blocks of the second.
  template <class Done, class MoreDone>
  void multiply2(int& part, const Weights& w, const Weights& second, int64_t more,
                 const Activations& a, const Done& done, const MoreDone& more_done) {
    if (a.rows > 1) {
      const int64_t chunks = ceil_div(a.width, kChunk);
      each(part, Pass::passes(a.rows) * chunks,
           [&](int64_t i) { interleave(a, i / chunks, i % chunks); });
    }
    const int64_t blocks = ceil_div(w.columns, kBlock);
    each(part, blocks + more, [&](int64_t block) {
      if (block < blocks)
        block_product(w, block, a, done);
      else
        block_product(second, block - blocks, a, more_done);
    });
  }

  const LoraLayer* adapter(int64_t token) const {
    return b_->adapters == nullptr ? nullptr : b_->adapters[token];
  }

  // Each token's A x for some pairs of its adapter, in fp32. No work in a step without adapters.
  void shrink(int& part, int64_t l, int first_pair, int last_pair) {
    if (b_->adapters == nullptr) return;
    constexpr int64_t kItems = kMaxRank / kRanks;
    const int64_t pairs = last_pair - first_pair + 1;
    each(part, b_->tokens * pairs * kItems, [&](int64_t i) {
      const int64_t t = i / (pairs * kItems), from = i % kItems * kRanks;
      const int number = first_pair + int(i / kItems % pairs);
      const LoraLayer* own = adapter(t);
      if (own == nullptr) return;
      const LoraPair& pair = own[l].pairs[number];
      const float* branches = &branches_[size_t(t * (s_.width + s_.inner))];
      const float* x = number == kFcOut     ? branches + s_.width
                       : number == kOutProj ? branches
                                            : &normed_[size_t(t * s_.width)];
      const int64_t inputs = number == kFcOut ? s_.inner : s_.width;
      float* y = small(t, number);
      for (int64_t r = from; r < std::min(pair.rank, from + kRanks); ++r) {
        Floats sum = zeros();
        for (int64_t k = 0; k < inputs; k += 16) {
          const Mask mask = first(inputs - k);
          sum = fma(load(pair.a + r * inputs + k, mask), load(x + k, mask), sum);
        }
        y[r] = sum_of(sum);
      }
    });
  }

  // Adds 16 columns of a pair's B (A x) to a token's product.
  Floats expand(int64_t t, int64_t l, int number, int64_t column, Floats y) const {
    const LoraLayer* own = adapter(t);
    if (own == nullptr) return y;
    const LoraPair& pair = own[l].pairs[number];
    const float* x = &small_[size_t((t * kPairs + number) * kMaxRank)];
    const float* b = pair.b + column * pair.rank;
    for (int64_t r = 0; r < pair.rank; ++r) y = fma(all(x[r]), load(b + r * 16), y);
    return y;
  }

  float* small(int64_t t, int number) {
    return &small_[size_t((t * kPairs + number) * kMaxRank)];
  }

  // Queries, keys and values, and the MLP's activated first half.
  void first_product(int& part, int64_t l, const Activations& normed) {
    const Layer& layer = layers_[size_t(l)];
    const int64_t inputs = s_.width + s_.inner;
    multiply2(
        part, layer.qkv, layer.fc_in, ceil_div(s_.inner, kBlock), normed,
        [&](int64_t row, int64_t column, Floats y, Mask mask) {
          if (b_->adapters != nullptr)
            y = expand(row, l, kQuery + int(column / s_.width), column % s_.width, y);
          store(&qkv_[size_t(row * 3 * s_.width + column)], mask, y);
        },
        [&](int64_t row, int64_t column, Floats y, Mask mask) {
          if (b_->adapters != nullptr) y = expand(row, l, kFcIn, column, y);
          store(&branches_[size_t(row * inputs + s_.width + column)], mask, gelu(y));
        });
  }

  // Both branches' output projections, added to the residual stream.
  void second_product(int& part, int64_t l, const Activations& branches) {
    multiply(part, layers_[size_t(l)].out, branches,
             [&](int64_t row, int64_t column, Floats y, Mask mask) {
               if (b_->adapters != nullptr) {
                 y = expand(row, l, kOutProj, column, y);
                 y = expand(row, l, kFcOut, column, y);
               }
               float* x = &x_[size_t(row * s_.width + column)];
               store(x, mask, add(load(x, mask), y));
             });
  }

  void embed(int64_t t) {
    float* x = &x_[size_t(t * s_.width)];
    const int64_t from = int64_t(b_->ids[t]) * s_.width;
    if (kind_ == Kind::fp32) {
      std::memcpy(x, static_cast<const float*>(m_.embedding) + from, size_t(s_.width) * 4);
    } else {
      const auto* row = static_cast<const uint16_t*>(m_.embedding) + from;
      for (int64_t i = 0; i < s_.width; ++i) x[i] = from_bf16(row[i]);
    }
  }

  // The norm as a row of activations for `w` and, if `kept` is not null, in fp32.
  void norm(const Weights& w, const Activations& a, int64_t row, const float* x,
            const float* weight, const float* bias, float* kept) {
    thread_local std::vector<float> own;
    fit(own, s_.width);
    float* y = kept == nullptr ? own.data() : kept;
    layer_norm(x, weight, bias, s_.epsilon, s_.width, y);
    convert(Kind(w.kind), y, s_.width, a, row);
  }

  // As many rows as `w` multiplies at a time.
  Activations activations(const Weights& w, int64_t rows) {
    const Kind kind = Kind(w.kind);
    const int64_t width = ceil_div(w.inputs, per_word(kind));
    return {by_row_.data(), rows == 1 ? by_row_.data() : turned_.data(), scales_.data(),
            sums_.data(), rows, width, width * words_each(kind), ceil_div(w.inputs, group(kind))};
  }

  // One head of one sequence: caches its new keys and values, then attends with its queries.
  void attend(int64_t layer, int64_t sequence, int64_t head) {
    const int32_t start = b_->query_start_loc[sequence], end = b_->query_start_loc[sequence + 1];
    const int32_t* pages = b_->page_table + sequence * b_->pages_per_row;
    if (kind_ == Kind::fp32)
      attend_in<Fp32>(layer, head, start, end, pages);
    else
      attend_in<Bf16>(layer, head, start, end, pages);
  }

  template <class K>
  using Element = std::conditional_t<std::is_same_v<K, Fp32>, float, uint16_t>;

  // Elements of the cache in a word.
  template <class K>
  static constexpr int64_t kPair = std::is_same_v<K, Fp32> ? 1 : 2;

  // Caches a head's key at a place of its page.
  template <class K>
  void cache_key(const float* x, int64_t place, Element<K>* keys, std::vector<Element<K>>& row) const {
    fit(row, s_.head);
    for (int64_t k = 0; k < s_.head; k += 16) {
      const Mask mask = first(s_.head - k);
      if constexpr (std::is_same_v<K, Fp32>) store(row.data() + k, mask, load(x + k, mask));
      else store_bf16(row.data() + k, mask, load(x + k, mask));
    }
    for (int64_t w = 0; w < s_.head / kPair<K>; ++w)
      std::memcpy(keys + (w * kPage + place) * kPair<K>, row.data() + w * kPair<K>, 4);
  }

  // Caches a head's value. The position after it, if of the same word, becomes 0: it is multiplied
  // by 0 until it is written, and must not be NaN.
  template <class K>
  void cache_value(const float* x, int64_t place, Element<K>* values) const {
    auto* words = reinterpret_cast<float*>(values + place / kPair<K> * s_.head * kPair<K>);
    for (int64_t k = 0; k < s_.head; k += 16) {
      const Mask mask = first(s_.head - k);
      Floats word = load(x + k, mask);
      if constexpr (std::is_same_v<K, Bf16>) {
        const Ints bits = as_ints(round_bf16(word));
        word = as_floats(place % 2 == 0
                             ? right<16>(bits)
                             : either(bits, both(as_ints(load(words + k, mask)), all_ints(0xffff))));
      }
      store(words + k, mask, word);
    }
  }

  // A thread takes heads in order, which are adjacent in a page: the next head's data is prefetched
  // while this one computes.
  static void fetch(const void* p) {
    _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
  }

  // Where a head's part of a page begins.
  template <class K>
  Element<K>* page(void* cache, int64_t layer, int64_t number, int64_t head) const {
    return static_cast<Element<K>*>(cache) +
           ((layer * s_.pages + number) * s_.heads + head) * kPage * s_.head;
  }

  template <class K>
  void attend_in(int64_t layer, int64_t head, int32_t start, int32_t end, const int32_t* pages) {
    thread_local std::vector<float> rotated, scores, weights;
    thread_local std::vector<Element<K>> key;
    thread_local std::vector<uint32_t> words;
    const Activations queries = query_rows<K>(words);
    fit(rotated, s_.head);
    for (int32_t t = start; t < end; ++t) {
      const int32_t position = b_->positions[t];
      Element<K>* keys = page<K>(m_.keys, layer, pages[position / kPage], head);
      Element<K>* values = page<K>(m_.values, layer, pages[position / kPage], head);
      const int64_t place = position % kPage;
      rotate(t, s_.width, head, rotated.data());
      cache_key<K>(rotated.data(), place, keys, key);
      cache_value<K>(&qkv_[size_t(t * 3 * s_.width + 2 * s_.width + head * s_.head)], place, values);
    }
    for (int32_t t = start; t < end;) {
      const int count = queries_of(end - t);
      for (int64_t q = 0; q < count; ++q) {
        rotate(int32_t(t + q), 0, head, rotated.data());
        convert(kind_, rotated.data(), s_.head, queries, q);
      }
      switch (count) {
#define QUERIES(Q) \
  case Q: attend_queries<K, Q>(layer, head, t, pages, words.data(), scores, weights); break;
        QUERIES(1) QUERIES(2) QUERIES(3) QUERIES(4) QUERIES(kMoreQueries) QUERIES(kQueries)
#undef QUERIES
      }
      t += count;
    }
  }

  // How many of the next queries share a pass: one of a few counts, since each is compiled.
  static int queries_of(int32_t left) {
    return left >= kQueries ? kQueries : left >= kMoreQueries ? kMoreQueries : std::min(left, 4);
  }

  // A head's queries as rows of activations, which keys multiply.
  template <class K>
  Activations query_rows(std::vector<uint32_t>& words) const {
    const int64_t width = s_.head / per_word(kind_), count = width * K::kParts;
    fit(words, kQueries * count);
    return {words.data(), words.data(), nullptr, nullptr, kQueries, width, count, 0};
  }

  // A head's query or key of a token, with rotary embedding applied.
  void rotate(int32_t t, int64_t offset, int64_t head, float* y) const {
    const float* x = &qkv_[size_t(t * 3 * s_.width + offset + head * s_.head)];
    const float* sines = m_.sines + b_->positions[t] * s_.rotated;
    const float* cosines = m_.cosines + b_->positions[t] * s_.rotated;
    for (int64_t i = 0; i < s_.rotated; i += 16) {
      const Mask mask = first(s_.rotated - i);
      const Floats own = load(x + i, mask);
      const Floats along = mul(own, load(cosines + i, mask));
      store(y + i, mask, fma(swapped(own), load(sines + i, mask), along));
    }
    std::memcpy(y + s_.rotated, x + s_.rotated, size_t(s_.head - s_.rotated) * 4);
  }

  // Attention of Q consecutive queries, the first of them token t. Scores of the whole context,
  // then their softmax, then the values: each query's own sums in the order of positions.
  template <class K, int Q>
  void attend_queries(int64_t layer, int64_t head, int32_t t, const int32_t* pages,
                      const uint32_t* queries, std::vector<float>& score_buffer,
                      std::vector<float>& weight_buffer) {
    const int64_t length = b_->positions[t] + Q;  // the last query's context
    const int64_t page_count = ceil_div(length, kPage);
    const int64_t stride = (page_count | 1) * kPage;  // odd in lines of cache, to use all its sets
    fit(score_buffer, Q * stride);
    fit(weight_buffer, Q * page_count * kPage);
    // Read once: each access to a thread_local variable is a function call.
    float *const scores = score_buffer.data(), *const weights = weight_buffer.data();
    constexpr int P = std::max(1, kScores / Q);  // pages at a time, for independent sums
    int64_t p = 0;
    for (; p + P <= page_count; p += P)
      score<K, Q, P>(layer, head, p, pages, queries, stride, scores);
    for (; p < page_count; ++p)
      score<K, Q, 1>(layer, head, p, pages, queries, stride, scores);
    float inverse[Q];
    for (int q = 0; q < Q; ++q)
      inverse[q] = softmax<K, Q>(scores + q * stride, length - (Q - 1 - q),
                                 page_count * kPage, weights + q);
    float* out[Q];
    for (int q = 0; q < Q; ++q)
      out[q] = &branches_[size_t((t + q) * (s_.width + s_.inner) + head * s_.head)];
    constexpr int V = std::clamp(kValues / Q, 1, 4);  // vectors of a value at a time
    for (int64_t k = 0; k < s_.head; k += 16 * V) {
      Floats sum[Q][V];
      Mask mask[V];
      unrolled<V>([&](auto v) GPTJ_INLINE_LAMBDA { mask[v] = first(s_.head - k - 16 * v); });
      for_each<Q, V>([&](auto q, auto v) GPTJ_INLINE_LAMBDA { sum[q][v] = zeros(); });
      const int64_t next = kPage * s_.head;  // elements to the next head's values
      for (int64_t i = 0; i < ceil_div(length, kPair<K>); ++i) {
        constexpr int64_t kWords = kPage / kPair<K>;  // of a page's positions
        const auto* row = page<K>(m_.values, layer, pages[i / kWords], head) +
                          (i % kWords * s_.head + k) * kPair<K>;
        if (Q < kQueries)
          unrolled<V>([&](auto v) GPTJ_INLINE_LAMBDA { fetch(row + next + 16 * v * kPair<K>); });
        unrolled<V>([&](auto v) GPTJ_INLINE_LAMBDA {
          const auto* from = reinterpret_cast<const float*>(row + 16 * v * kPair<K>);
          const Ints word = as_ints(load(from, mask[v]));
          unrolled<K::kParts>([&](auto part) GPTJ_INLINE_LAMBDA {
            const auto value = K::part(word, part);
            unrolled<Q>([&](auto q) GPTJ_INLINE_LAMBDA {
              uint32_t weight;
              std::memcpy(&weight, weights + (i * K::kParts + part) * Q + q, 4);
              sum[q][v] = K::dot(sum[q][v], value, weight);
            });
          });
        });
      }
      for_each<Q, V>([&](auto q, auto v) GPTJ_INLINE_LAMBDA {
        store(out[q] + k + 16 * v, mask[v], mul(sum[q][v], all(inverse[q])));
      });
    }
  }

  // The scores of P pages from p on.
  template <class K, int Q, int P>
  void score(int64_t layer, int64_t head, int64_t p, const int32_t* pages, const uint32_t* queries,
             int64_t stride, float* scores) {
    const int64_t words = s_.head / kPair<K>;
    const Element<K>* keys[P];
    unrolled<P>([&](auto i) GPTJ_INLINE_LAMBDA {
      keys[i] = page<K>(m_.keys, layer, pages[p + i], head);
    });
    Floats sum[Q][P];
    for_each<Q, P>([&](auto q, auto i) GPTJ_INLINE_LAMBDA { sum[q][i] = zeros(); });
    for (int64_t w = 0; w < words; ++w)
      unrolled<P>([&](auto i) GPTJ_INLINE_LAMBDA {
        if (Q < kQueries) fetch(keys[i] + (words + w) * kPage * kPair<K>);  // the next head's
        unrolled<K::kParts>([&](auto part) GPTJ_INLINE_LAMBDA {
          const auto key = K::part(load_ints(keys[i] + w * kPage * kPair<K>), part);
          unrolled<Q>([&](auto q) GPTJ_INLINE_LAMBDA {
            sum[q][i] = K::dot(sum[q][i], key, queries[(q * words + w) * K::kParts + part]);
          });
        });
      });
    for_each<Q, P>([&](auto q, auto i) GPTJ_INLINE_LAMBDA {
      store(scores + q * stride + (p + i) * kPage, sum[q][i]);
    });
  }

  // Turns a query's scores into unnormalized weights, as words that `K::dot` takes, Q apart; returns
  // 1 / sum. Weights beyond `length` become 0, whatever a page's unused slots hold.
  template <class K, int Q>
  float softmax(float* scores, int64_t length, int64_t count, float* weights) const {
    const Floats scale = all(1.0f / std::sqrt(float(s_.head)));
    const Floats least = all(-INFINITY);
    Floats most = least;
    for (int64_t i = 0; i < length; i += 16)
      most = max(most, load_or(least, first(length - i), scores + i));
    const Floats top = all(max_of(most));
    constexpr int64_t kWords = 16 / kPair<K> * K::kParts;  // of 16 positions
    Floats total = zeros();
    for (int64_t i = 0; i < count; i += 16) {
      const Floats e =
          keep(first(length - i), exp(mul(sub(load(scores + i), top), scale)));
      total = add(total, e);
      float words[16];
      if constexpr (std::is_same_v<K, Fp32>)
        store(words, e);
      else if constexpr (K::kParts == 1)
        store_bf16(reinterpret_cast<uint16_t*>(words), first(16), e);
      else
        store(words, round_bf16(e));
      for (int64_t k = 0; k < kWords; ++k) weights[(i / 16 * kWords + k) * Q] = words[k];
    }
    return 1.0f / sum_of(total);
  }

  const Sizes s_;
  Model m_;
  const std::vector<Layer> layers_;
  const Kind kind_;  // of the cache and the embedding
  ThreadPool pool_;
  const Step* b_ = nullptr;
  std::vector<Counter> counters_;
  std::vector<float> x_, qkv_, branches_, scales_;
  std::vector<float> normed_, small_;  // of tokens with an adapter: their norms, and A x by pair
  std::vector<uint32_t> by_row_, turned_;
  std::vector<int32_t> sums_;
};

// Applies to the whole pages within; advice, which the system may ignore.
void advise(void* data, int64_t bytes, int advice) {
  const uintptr_t page = 4096, from = (uintptr_t(data) + page - 1) / page * page;
  const uintptr_t to = (uintptr_t(data) + uintptr_t(bytes)) / page * page;
  if (to > from) madvise(reinterpret_cast<void*>(from), to - from, advice);
}

}  // namespace

extern "C" {

// Returns null if memory or threads run out.
void* gptj_create(const Sizes* sizes, const Model* model) {
  try {
    return new Runner(*sizes, *model);
  } catch (const std::exception&) {
    return nullptr;
  }
}

// Returns 0, or 1 if memory ran out.
int gptj_step(void* runner, const Step* step) {
  try {
    static_cast<Runner*>(runner)->step(*step);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

void gptj_destroy(void* runner) { delete static_cast<Runner*>(runner); }

// Requests huge pages, which make reading weights faster; the system may ignore it.
void gptj_prefer_large_pages(void* data, int64_t bytes) { advise(data, bytes, MADV_HUGEPAGE); }

// Returns the memory to the system; its content is undefined afterwards.
void gptj_discard(void* data, int64_t bytes) { advise(data, bytes, MADV_DONTNEED); }

// Reads `bytes` (a multiple of 64) once on this many threads: the lower bound of a step's time.
int64_t gptj_read(const void* data, int64_t bytes, int threads) {
  ThreadPool pool(threads);
  std::atomic<int64_t> next{0}, total{0};
  const int64_t piece = 1 << 17;
  const std::function<void()> job = [&] {
    Ints sums[4] = {};
    for (int64_t i; (i = next.fetch_add(piece)) < bytes;)
      for (int64_t end = std::min(bytes, i + piece); i + 256 <= end; i += 256)
        for (int v = 0; v < 4; ++v)
          sums[v] = add_long(sums[v], load_ints(static_cast<const char*>(data) + i + 64 * v));
    for (const auto& sum : sums) total += sum_of_long(sum);
  };
  pool.run(job);
  return total;
}
}
