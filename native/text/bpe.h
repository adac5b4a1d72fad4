// BPE over bytes (GPT-2) or over characters with byte fallback (SentencePiece): an encoder for any merge list, and a trainer of the
// first kind. Neither knows JavaScript or file formats.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/split.h"

namespace limbeck::text {

// Open addressing from a pair of symbols to a value; pairs are never removed.
template <class Value>
class PairMap {
 public:
  explicit PairMap(size_t expected = 8) { grow(expected * 2); }

  static uint64_t key_of(int32_t left, int32_t right) { return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right); }

  Value* find(uint64_t key) {
    for (size_t i = slot(key);; i = (i + 1) & mask_) {
      if (keys_[i] == key) return &values_[i];
      if (keys_[i] == kEmpty) return nullptr;
    }
  }
  const Value* find(uint64_t key) const { return const_cast<PairMap*>(this)->find(key); }

  // Valid until the next insert.
  Value& operator[](uint64_t key) {
    if (Value* value = find(key)) return *value;
    if ((size_ + 1) * 2 > keys_.size()) grow(keys_.size() * 2);
    ++size_;
    size_t i = slot(key);
    while (keys_[i] != kEmpty) i = (i + 1) & mask_;
    keys_[i] = key;
    return values_[i];
  }
  size_t size() const { return size_; }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};

  size_t slot(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u >> 20) & mask_; }
  void grow(size_t wanted) {
    size_t capacity = 16;
    while (capacity < wanted) capacity *= 2;
    std::vector<uint64_t> keys(capacity, kEmpty);
    std::vector<Value> values(capacity);
    keys.swap(keys_);
    values.swap(values_);
    mask_ = capacity - 1;
    for (size_t k = 0; k < keys.size(); ++k) {
      if (keys[k] == kEmpty) continue;
      size_t i = slot(keys[k]);
      while (keys_[i] != kEmpty) i = (i + 1) & mask_;
      keys_[i] = keys[k];
      values_[i] = std::move(values[k]);
    }
  }

  std::vector<uint64_t> keys_;
  std::vector<Value> values_;
  size_t mask_ = 0, size_ = 0;
};

struct Merge {
  int32_t left, right, result;
};

// What makes a vocabulary one over characters. Spaces become U+2581 before anything else.
struct Characters {
  std::vector<std::pair<int32_t, int32_t>> ids;    // code point, token; a character without one becomes the tokens of its bytes
  std::vector<std::pair<int32_t, int32_t>> joins;  // last character of a merge's left side, first of its right side
  bool prepend = false;                            // a space before every text
};

struct Vocabulary {
  std::vector<int32_t> byte_ids;                          // 256: the token of each byte
  std::vector<Merge> merges;                              // in order of rank
  std::vector<std::pair<std::string, int32_t>> added;     // found in the text before anything else, longest first
  std::vector<std::pair<std::string, int32_t>> whole;     // words that are tokens whatever the merges say (ignore_merges)
  SplitRules rules;
  std::unique_ptr<Characters> characters;                 // null: a vocabulary over bytes
};

// Immutable, so that any number of threads may encode at once, each with a cache of its own.
class Encoder {
 public:
  // Encoded short words, direct-mapped.
  class Cache;
  struct CacheDeleter {
    void operator()(Cache*) const;
  };
  using CachePtr = std::unique_ptr<Cache, CacheDeleter>;

  explicit Encoder(Vocabulary vocabulary);
  ~Encoder();

  static CachePtr make_cache();
  // Appends the tokens of `text` to `ids`. `added`: the text of added tokens stands for them.
  void encode(std::string_view text, bool added, Cache& cache, std::vector<int32_t>& ids) const;

 private:
  struct Rank {
    int32_t rank = -1, result = -1;
  };
  struct WholeWords;

  void encode_part(const uint8_t* text, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const;
  void encode_characters(const uint8_t* text, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const;
  void encode_cached(const uint8_t* word, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const;
  void encode_word(const uint8_t* word, size_t bytes, std::vector<int32_t>& ids) const;
  void merge_short(std::vector<int32_t>& ids, size_t from) const;
  void merge_long(std::vector<int32_t>& ids, size_t from) const;
  size_t added_at(std::string_view rest, int32_t& id) const;
  const Rank* rank_of(int32_t left, int32_t right) const { return ranks_.find(PairMap<Rank>::key_of(left, right)); }

  Vocabulary vocabulary_;
  PairMap<Rank> ranks_;
  PairMap<int32_t> char_ids_;  // of (0, code point)
  PairMap<uint8_t> joins_;
  std::unique_ptr<WholeWords> whole_;
  bool added_first_[256] = {};
};

// Counts words, then merges the most frequent pair again and again; equal counts go to the smaller pair (left, then right).
// Symbols 0..255 are the bytes in the order of alphabet(); symbol 256 + i is the i-th merge.
class Trainer {
 public:
  struct Options {
    int64_t merges = 0;        // at most
    int64_t min_count = 2;     // a pair that is rarer is never merged
    size_t max_bytes = 64;     // of a token
    size_t max_words = 8'000'000;  // distinct words kept; beyond, the rarest are forgotten
    SplitRules rules;
  };

  explicit Trainer(const Options& options);
  ~Trainer();

  // The bytes in the order of the characters that stand for them in tokenizer.json.
  static std::vector<uint8_t> alphabet();

  // One text or a part of one that ends where a word ends.
  void count(std::string_view text);
  // Makes up to `limit` more merges and tells whether training is over. No count() after the first call.
  bool merge(int64_t limit);

  const std::vector<std::pair<int32_t, int32_t>>& merges() const;
  int64_t words() const;     // distinct
  int64_t forgotten() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace limbeck::text
