#include <algorithm>
#include <cstring>
#include <queue>

#include "text/bpe.h"

namespace limbeck::text {
namespace {

// A longer word (a run of one character, text without spaces) is counted in pieces, so that a merge never rescans megabytes.
constexpr size_t kLongestWord = 512;

uint64_t hash_of(std::string_view word) {
  uint64_t h = word.size() * 0x9E3779B97F4A7C15u;
  size_t i = 0;
  const auto mix = [&h](uint64_t x) {
    h = (h ^ x) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 31;
  };
  for (; i + 8 <= word.size(); i += 8) {
    uint64_t x;
    std::memcpy(&x, word.data() + i, 8);
    mix(x);
  }
  uint64_t tail = 0;
  std::memcpy(&tail, word.data() + i, word.size() - i);
  mix(tail);
  return h;
}

// Distinct words with their counts; bytes live in one arena.
class WordTable {
 public:
  struct Word {
    uint64_t hash;
    uint64_t at;
    uint32_t bytes;
    int64_t count;
  };

  void add(std::string_view text, int64_t count) {
    const uint64_t hash = hash_of(text);
    for (size_t i = hash & mask_;; i = (i + 1) & mask_) {
      if (slots_[i] == 0) {
        words.push_back({hash, arena_.size(), static_cast<uint32_t>(text.size()), count});
        arena_.append(text);
        slots_[i] = static_cast<uint32_t>(words.size());
        if (words.size() * 2 > slots_.size()) rebuild(slots_.size() * 2);
        return;
      }
      Word& word = words[slots_[i] - 1];
      if (word.hash == hash && view(word) == text) {
        word.count += count;
        return;
      }
    }
  }
  std::string_view view(const Word& word) const { return {arena_.data() + word.at, word.bytes}; }

  // Drops the rarest words until at most half of `limit` is left; tells how many.
  int64_t forget(size_t limit) {
    std::vector<int64_t> counts;
    counts.reserve(words.size());
    for (const Word& w : words) counts.push_back(w.count);
    const auto middle = counts.end() - static_cast<ptrdiff_t>(limit / 2);
    std::nth_element(counts.begin(), middle, counts.end());
    const int64_t threshold = *middle;
    WordTable kept;
    for (const Word& w : words) {
      if (w.count > threshold) kept.add(view(w), w.count);
    }
    const auto gone = static_cast<int64_t>(words.size() - kept.words.size());
    *this = std::move(kept);
    return gone;
  }

  std::vector<Word> words;

 private:
  void rebuild(size_t capacity) {
    slots_.assign(capacity, 0);
    mask_ = capacity - 1;
    for (size_t w = 0; w < words.size(); ++w) {
      size_t i = words[w].hash & mask_;
      while (slots_[i] != 0) i = (i + 1) & mask_;
      slots_[i] = static_cast<uint32_t>(w + 1);
    }
  }

  std::string arena_;
  std::vector<uint32_t> slots_ = std::vector<uint32_t>(1024, 0);  // index + 1
  size_t mask_ = 1023;
};

}  // namespace

struct Trainer::State {
  struct Word {
    size_t at;  // of its first symbol
    uint32_t length;
    int64_t count;
  };
  struct Pair {
    int64_t count = 0;
    std::vector<uint32_t> words;  // that had the pair once; some may have lost it
  };
  struct Candidate {
    int64_t count;
    uint64_t key;
    bool operator<(const Candidate& o) const { return count != o.count ? count < o.count : key > o.key; }
  };

  Options options;
  WordTable table;
  int64_t forgotten = 0, distinct = 0;
  bool started = false;

  std::vector<int32_t> symbols;
  std::vector<Word> words;
  PairMap<uint32_t> index;  // pair -> pairs[]
  std::vector<Pair> pairs;
  std::priority_queue<Candidate> queue;  // counts may be too high: a pair that lost some is put back when it comes up
  std::vector<size_t> bytes;             // of each symbol
  std::vector<std::pair<int32_t, int32_t>> merges;
  std::vector<uint64_t> fresh;           // pairs that the current merge made

  Pair& pair_of(uint64_t key, bool& is_new) {
    uint32_t& at = index[key];
    is_new = at == 0;
    if (is_new) {
      pairs.emplace_back();
      at = static_cast<uint32_t>(pairs.size());
    }
    return pairs[at - 1];
  }
  void gain(int32_t left, int32_t right, uint32_t word) {
    bool is_new = false;
    const uint64_t key = PairMap<uint32_t>::key_of(left, right);
    Pair& pair = pair_of(key, is_new);
    pair.count += words[word].count;
    if (pair.words.empty() || pair.words.back() != word) pair.words.push_back(word);
    if (is_new) fresh.push_back(key);
  }
  void lose(int32_t left, int32_t right, int64_t count) { pairs[*index.find(PairMap<uint32_t>::key_of(left, right)) - 1].count -= count; }

  void push_fresh() {
    for (const uint64_t key : fresh) {
      const int64_t count = pairs[*index.find(key) - 1].count;
      if (count >= options.min_count) queue.push({count, key});
    }
    fresh.clear();
  }
  void start();
  void apply(uint64_t key);
};

Trainer::Trainer(const Options& options) : state_(std::make_unique<State>()) { state_->options = options; }
Trainer::~Trainer() = default;

std::vector<uint8_t> Trainer::alphabet() {
  const auto shown = [](int b) { return (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE; };
  std::vector<uint8_t> order;
  for (const bool wanted : {true, false}) {
    for (int b = 0; b < 256; ++b) {
      if (shown(b) == wanted) order.push_back(static_cast<uint8_t>(b));
    }
  }
  return order;
}

void Trainer::count(std::string_view text) {
  Splitter splitter(state_->options.rules, reinterpret_cast<const uint8_t*>(text.data()), text.size());
  size_t n = 0;
  while (const uint8_t* word = splitter.next(n)) {
    while (n > 0) {
      size_t piece = n;
      if (piece > kLongestWord) {
        piece = kLongestWord;
        while (piece > kLongestWord - 4 && (word[piece] & 0xC0) == 0x80) --piece;
      }
      state_->table.add({reinterpret_cast<const char*>(word), piece}, 1);
      word += piece;
      n -= piece;
    }
  }
  if (state_->table.words.size() > state_->options.max_words) state_->forgotten += state_->table.forget(state_->options.max_words);
}

void Trainer::State::start() {
  started = true;
  int32_t symbol_of[256];
  const std::vector<uint8_t> order = alphabet();
  for (int i = 0; i < 256; ++i) symbol_of[order[i]] = i;
  bytes.assign(256, 1);
  distinct = static_cast<int64_t>(table.words.size());
  for (const WordTable::Word& word : table.words) {
    if (word.bytes < 2) continue;
    const size_t at = symbols.size();
    for (const char c : table.view(word)) symbols.push_back(symbol_of[static_cast<uint8_t>(c)]);
    words.push_back({at, word.bytes, word.count});
    for (uint32_t i = 0; i + 1 < word.bytes; ++i) gain(symbols[at + i], symbols[at + i + 1], static_cast<uint32_t>(words.size() - 1));
  }
  table = WordTable{};
  push_fresh();
}

// Rewrites every word that holds the pair, left to right, and keeps the counts of the neighbouring pairs.
void Trainer::State::apply(uint64_t key) {
  const auto a = static_cast<int32_t>(key >> 32), b = static_cast<int32_t>(key & 0xFFFFFFFF);
  const auto merged = static_cast<int32_t>(256 + merges.size());
  merges.emplace_back(a, b);
  bytes.push_back(bytes[a] + bytes[b]);
  const uint32_t at = *index.find(key) - 1;
  const std::vector<uint32_t> where = std::move(pairs[at].words);
  for (const uint32_t w : where) {
    Word& word = words[w];
    int32_t* const s = symbols.data() + word.at;
    uint32_t out = 0;
    for (uint32_t i = 0; i < word.length;) {
      if (i + 1 == word.length || s[i] != a || s[i + 1] != b) {
        s[out++] = s[i++];
        continue;
      }
      if (out > 0) {
        lose(s[out - 1], a, word.count);
        gain(s[out - 1], merged, w);
      }
      if (i + 2 < word.length) {
        lose(b, s[i + 2], word.count);
        gain(merged, s[i + 2], w);
      }
      s[out++] = merged;
      i += 2;
    }
    word.length = out;
  }
  pairs[at].count = 0;
  pairs[at].words = {};
  push_fresh();
}

bool Trainer::merge(int64_t limit) {
  State& s = *state_;
  if (!s.started) s.start();
  while (static_cast<int64_t>(s.merges.size()) < s.options.merges) {
    if (limit <= 0) return false;
    if (s.queue.empty()) return true;
    const auto [count, key] = s.queue.top();
    s.queue.pop();
    const int64_t now = s.pairs[*s.index.find(key) - 1].count;
    if (now < s.options.min_count) continue;
    if (now != count) {
      s.queue.push({now, key});
      continue;
    }
    if (s.bytes[key >> 32] + s.bytes[key & 0xFFFFFFFF] > s.options.max_bytes) continue;
    s.apply(key);
    --limit;
  }
  return true;
}

const std::vector<std::pair<int32_t, int32_t>>& Trainer::merges() const { return state_->merges; }
int64_t Trainer::words() const { return state_->started ? state_->distinct : static_cast<int64_t>(state_->table.words.size()); }
int64_t Trainer::forgotten() const { return state_->forgotten; }

}  // namespace limbeck::text
