#include <algorithm>
#include <cstring>
#include <functional>
#include <queue>
#include <unordered_map>

#include "core/error.h"
#include "text/bpe.h"

namespace limbeck::text {
namespace {

constexpr size_t kKeyBytes = 24, kCachedIds = 8, kSlots = size_t{1} << 15;
constexpr size_t kShort = 96;  // words up to here are merged by scanning, longer ones with a heap

uint64_t mix(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9E3779B97F4A7C15u;
  return h ^ (h >> 29);
}

}  // namespace

class Encoder::Cache {
 public:
  struct Slot {
    uint64_t key[3] = {};  // the word's bytes, zero-padded
    uint8_t bytes = 0;     // 0: empty
    uint8_t count = 0;
    int32_t ids[kCachedIds];
  };
  Slot& slot(const uint64_t (&key)[3], size_t bytes) {
    return slots_[mix(mix(mix(bytes, key[0]), key[1]), key[2]) >> 40 & (kSlots - 1)];
  }

 private:
  std::vector<Slot> slots_{kSlots};
};

void Encoder::CacheDeleter::operator()(Cache* cache) const { delete cache; }
Encoder::CachePtr Encoder::make_cache() { return CachePtr(new Cache); }

struct Encoder::WholeWords {
  std::unordered_map<std::string_view, int32_t> ids;
};

Encoder::Encoder(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)), ranks_(vocabulary_.merges.size()) {
  if (vocabulary_.byte_ids.size() != 256) throw Error(ErrorKind::format, "ERR_TOKENIZER", "tokenizer: the vocabulary has no token for every byte");
  int32_t rank = 0;
  for (const Merge& m : vocabulary_.merges) ranks_[PairMap<Rank>::key_of(m.left, m.right)] = {rank++, m.result};
  if (vocabulary_.characters) {
    for (const auto& [c, id] : vocabulary_.characters->ids) char_ids_[PairMap<int32_t>::key_of(0, c)] = id;
    for (const auto& [left, right] : vocabulary_.characters->joins) joins_[PairMap<uint8_t>::key_of(left, right)] = 1;
  }
  std::sort(vocabulary_.added.begin(), vocabulary_.added.end());
  for (const auto& [text, id] : vocabulary_.added) {
    if (!text.empty()) added_first_[static_cast<uint8_t>(text[0])] = true;
  }
  if (!vocabulary_.whole.empty()) {
    whole_ = std::make_unique<WholeWords>();
    for (const auto& [text, id] : vocabulary_.whole) whole_->ids.emplace(text, id);
  }
}

Encoder::~Encoder() = default;

// Longest added token that `rest` begins with: its length, or 0. The list is sorted, so each byte narrows a range of it.
size_t Encoder::added_at(std::string_view rest, int32_t& id) const {
  auto low = vocabulary_.added.begin(), high = vocabulary_.added.end();
  size_t longest = 0;
  for (size_t depth = 0; depth < rest.size() && low != high; ++depth) {
    const auto c = static_cast<unsigned char>(rest[depth]);
    const auto byte = [depth](const auto& entry) { return depth < entry.first.size() ? int{static_cast<unsigned char>(entry.first[depth])} : -1; };
    low = std::partition_point(low, high, [&](const auto& entry) { return byte(entry) < c; });
    high = std::partition_point(low, high, [&](const auto& entry) { return byte(entry) == c; });
    if (low != high && low->first.size() == depth + 1) {
      longest = depth + 1;
      id = low->second;
    }
  }
  return longest;
}

void Encoder::encode(std::string_view text, bool added, Cache& cache, std::vector<int32_t>& ids) const {
  const auto* bytes = reinterpret_cast<const uint8_t*>(text.data());
  ids.reserve(ids.size() + text.size() / 4 + 16);
  size_t from = 0;
  if (added && !vocabulary_.added.empty()) {
    for (size_t i = 0; i < text.size();) {
      int32_t id = 0;
      const size_t length = added_first_[bytes[i]] ? added_at(text.substr(i), id) : 0;
      if (length == 0) {
        ++i;
        continue;
      }
      encode_part(bytes + from, i - from, cache, ids);
      ids.push_back(id);
      from = i += length;
    }
  }
  encode_part(bytes + from, text.size() - from, cache, ids);
}

void Encoder::encode_part(const uint8_t* text, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const {
  if (vocabulary_.characters) return encode_characters(text, bytes, cache, ids);
  Splitter splitter(vocabulary_.rules, text, bytes);
  size_t n = 0;
  while (const uint8_t* word = splitter.next(n)) {
    if (n == 1 && !whole_) {
      ids.push_back(vocabulary_.byte_ids[*word]);
    } else {
      encode_cached(word, n, cache, ids);
    }
  }
}

// There is no pre-tokenizer: the whole text is one word to BPE. But no merge ever crosses two characters that no merge joins, so
// the text falls into words there all the same.
void Encoder::encode_characters(const uint8_t* text, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const {
  if (bytes == 0) return;
  constexpr std::string_view space = "\xE2\x96\x81";
  std::string normal;
  normal.reserve(bytes + bytes / 2);
  if (vocabulary_.characters->prepend) normal += space;
  for (size_t i = 0; i < bytes; ++i) {
    if (text[i] == ' ') normal += space;
    else normal += static_cast<char>(text[i]);
  }
  const auto* p = reinterpret_cast<const uint8_t*>(normal.data());
  const uint8_t* const end = p + normal.size();
  const uint8_t* word = p;
  for (uint32_t previous = 0; p < end;) {
    const CodePoint c = code_point_at(p, end);
    if (p != word && !joins_.find(PairMap<uint8_t>::key_of(static_cast<int32_t>(previous), static_cast<int32_t>(c.value)))) {
      encode_cached(word, static_cast<size_t>(p - word), cache, ids);
      word = p;
    }
    previous = c.value;
    p += c.length ? c.length : 1;
  }
  encode_cached(word, static_cast<size_t>(end - word), cache, ids);
}

void Encoder::encode_cached(const uint8_t* word, size_t bytes, Cache& cache, std::vector<int32_t>& ids) const {
  if (bytes > kKeyBytes) return encode_word(word, bytes, ids);
  uint64_t key[3] = {};
  std::memcpy(key, word, bytes);
  Cache::Slot& slot = cache.slot(key, bytes);
  if (slot.bytes == bytes && slot.key[0] == key[0] && slot.key[1] == key[1] && slot.key[2] == key[2]) {
    ids.insert(ids.end(), slot.ids, slot.ids + slot.count);
    return;
  }
  const size_t before = ids.size();
  encode_word(word, bytes, ids);
  const size_t count = ids.size() - before;
  if (count > kCachedIds) return;
  std::memcpy(slot.key, key, sizeof key);
  std::copy_n(ids.data() + before, count, slot.ids);
  slot.count = static_cast<uint8_t>(count);
  slot.bytes = static_cast<uint8_t>(bytes);
}

void Encoder::encode_word(const uint8_t* word, size_t bytes, std::vector<int32_t>& ids) const {
  if (whole_) {
    const auto found = whole_->ids.find({reinterpret_cast<const char*>(word), bytes});
    if (found != whole_->ids.end()) {
      ids.push_back(found->second);
      return;
    }
  }
  const size_t from = ids.size();
  if (vocabulary_.characters) {
    for (size_t i = 0; i < bytes;) {
      const CodePoint c = code_point_at(word + i, word + bytes);
      const int32_t* id = c.length ? char_ids_.find(PairMap<int32_t>::key_of(0, static_cast<int32_t>(c.value))) : nullptr;
      const size_t stop = i + (c.length ? c.length : 1);
      if (id) ids.push_back(*id);
      else for (size_t j = i; j < stop; ++j) ids.push_back(vocabulary_.byte_ids[word[j]]);
      i = stop;
    }
  } else {
    for (size_t i = 0; i < bytes; ++i) ids.push_back(vocabulary_.byte_ids[word[i]]);
  }
  if (ids.size() - from <= kShort) {
    merge_short(ids, from);
  } else {
    merge_long(ids, from);
  }
}

// Both merge the pair of lowest rank, the leftmost of equals, until no pair has a rank.
void Encoder::merge_short(std::vector<int32_t>& ids, size_t from) const {
  int32_t* const token = ids.data() + from;
  size_t n = ids.size() - from;
  Rank pair[kShort + 1];  // of tokens i and i + 1
  const auto look = [&](size_t i) {
    const Rank* r = rank_of(token[i], token[i + 1]);
    pair[i] = r ? *r : Rank{INT32_MAX, -1};
  };
  for (size_t i = 0; i + 1 < n; ++i) look(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (pair[i].rank < pair[best].rank) best = i;
    }
    if (pair[best].rank == INT32_MAX) break;
    token[best] = pair[best].result;
    --n;
    for (size_t i = best + 1; i < n; ++i) {
      token[i] = token[i + 1];
      pair[i] = pair[i + 1];
    }
    if (best > 0) look(best - 1);
    if (best + 1 < n) look(best);
  }
  ids.resize(from + n);
}

void Encoder::merge_long(std::vector<int32_t>& ids, size_t from) const {
  struct Node {
    int32_t token, previous, next;  // token < 0: merged away
  };
  struct Entry {
    int32_t rank, at, left, right;
    bool operator>(const Entry& o) const { return rank != o.rank ? rank > o.rank : at > o.at; }
  };
  const size_t n = ids.size() - from;
  if (n > INT32_MAX) throw Error(ErrorKind::data, "ERR_TEXT_LENGTH", "tokenizer: a single word of the text has more than 2^31 bytes");
  std::vector<Node> nodes(n);
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> queue;
  const auto push = [&](int32_t left) {
    const int32_t right = nodes[left].next;
    if (const Rank* r = rank_of(nodes[left].token, nodes[right].token)) queue.push({r->rank, left, nodes[left].token, nodes[right].token});
  };
  for (size_t i = 0; i < n; ++i) nodes[i] = {ids[from + i], static_cast<int32_t>(i) - 1, i + 1 < n ? static_cast<int32_t>(i) + 1 : -1};
  for (size_t i = 0; i + 1 < n; ++i) push(static_cast<int32_t>(i));
  while (!queue.empty()) {
    const Entry entry = queue.top();
    queue.pop();
    Node& left = nodes[entry.at];
    // An entry is stale when either side was merged since.
    if (left.token != entry.left || left.next < 0 || nodes[left.next].token != entry.right) continue;
    Node& right = nodes[left.next];
    left.token = rank_of(entry.left, entry.right)->result;
    left.next = right.next;
    right.token = -1;
    if (left.next >= 0) {
      nodes[left.next].previous = entry.at;
      push(entry.at);
    }
    if (left.previous >= 0) push(left.previous);
  }
  ids.resize(from);
  for (int32_t i = 0; i >= 0; i = nodes[i].next) ids.push_back(nodes[i].token);
}

}  // namespace limbeck::text
